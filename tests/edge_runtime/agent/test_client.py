"""Signed calls: what a device makes of a coordinator whose clock differs from its own."""

from __future__ import annotations

from email.utils import formatdate

import pytest

from edge_runtime.agent.client import MAX_CORRECTION_S, Client
from edge_runtime.agent.transport import Request, Response
from edge_runtime.errors import RefusedError
from edge_runtime.protocol.messages import CheckInRequest, ComeBack, Refusal, encode
from edge_runtime.protocol.signing import generate_key, parse_request_signature

CHECK_IN = CheckInRequest("test", 1 << 30, 1 << 20, 10)
NOW_S = 1_700_000_000.0


class Judge:
    """A coordinator that does nothing but look at the time of signatures; with ``dated`` it tells its own."""

    def __init__(self, now_s: float, *, dated: bool = True) -> None:
        self.now_s = now_s
        self.dated = dated
        self.nonces: list[str] = []

    def send(self, request: Request) -> Response:
        """See :class:`edge_runtime.agent.transport.Transport`."""
        signature = parse_request_signature(request.headers)
        self.nonces.append(signature.nonce)
        headers = {"date": formatdate(self.now_s, usegmt=True)} if self.dated else {}
        if abs(signature.created_s - self.now_s) > 300:
            return Response(401, headers, encode(Refusal("clock_off", "set the clock")))
        return Response(200, headers, encode(ComeBack(1.0, 2.0)))


@pytest.mark.parametrize("off_s", [-80_000.0, -400.0, 0.0, 301.0, 80_000.0])
def test_signatures_go_by_the_coordinator(off_s: float) -> None:
    """A request refused for its time is sent once more by the coordinator's clock, and later ones go by it at once."""
    judge = Judge(NOW_S + off_s)
    client = Client(judge, generate_key(), "d-1", clock=lambda: NOW_S)
    for _ in range(2):
        assert client.check_in(CHECK_IN) == ComeBack(1.0, 2.0)
    assert len(set(judge.nonces)) == len(judge.nonces) == (3 if abs(off_s) > 300 else 2)
    judge.now_s -= 700  # and it is set again
    assert client.check_in(CHECK_IN) == ComeBack(1.0, 2.0)


@pytest.mark.parametrize(
    "judge", [Judge(NOW_S + MAX_CORRECTION_S + 60), Judge(NOW_S + 1000, dated=False)], ids=["days", "no date"]
)
def test_what_cannot_be_corrected_is_refused(judge: Judge) -> None:
    """Clocks that are days apart, or a coordinator that does not tell the time, are left to a person."""
    client = Client(judge, generate_key(), "d-1", clock=lambda: NOW_S)
    with pytest.raises(RefusedError, match="clock_off"):
        client.check_in(CHECK_IN)
    assert len(judge.nonces) == 1
