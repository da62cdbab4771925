"""Texts token by token: prompt in, pieces of text out, until a stop token, a stop string or a limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from edge_runtime.data.batches import Tokenizer
from edge_runtime.data.rows import Row
from edge_runtime.errors import DataError
from edge_runtime.execution.decoder import Decoder
from edge_runtime.inference.requests import Finished, GenerateText, Piece, StopReason
from edge_runtime.inference.sampling import Sampler
from edge_runtime.package.slices import Values


def generate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    values: Values,
    request: GenerateText,
    sequence_limit: int,
    told_to_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Piece | Finished]:
    """Go on from a text. Its pieces come as they are known; what may begin a stop string waits until it does not.

    Args:
        decoder: decode programs; its cache is emptied first.
        tokenizer: the package's tokenizer, which cuts off nothing below one token over ``sequence_limit``.
        values: values of all slices, by flat name.
        request: the text and how to go on.
        sequence_limit: largest number of tokens of prompt and generated text together.
        told_to_stop: function that is asked before each token.

    Raises:
        DataError: the text leaves no room for a token.
    """
    started_s = time.monotonic()
    stop_tokens = frozenset(decoder.manifest.generation.stop_token_ids if decoder.manifest.generation else ())
    prompt = _prompt(tokenizer, request.text, stop_tokens, sequence_limit)
    decoder.forget()
    sampler, stream, stops = (
        Sampler(request.sampling),
        tokenizer.stream(prompt),
        StopStrings(request.sampling.stop),
    )
    room = sequence_limit - len(prompt)
    most = min(room, request.sampling.max_tokens or room)
    new, count = prompt, 0
    reason: StopReason = "length"
    while count < most:
        if told_to_stop():
            reason = "stopped"
            break
        token = sampler.next_token(decoder.next_logits(values, new))
        if token in stop_tokens:
            reason = "stop_token"
            break
        count, new = count + 1, [token]
        if text := stops.passed(stream.step(token)):
            yield Piece(text, count)
        if stops.met:
            reason = "stop_string"
            break
    if text := stops.rest():
        yield Piece(text, max(count, 1))
    yield Finished(reason, len(prompt), count, time.monotonic() - started_s)


class StopStrings:
    """A text on its way out, which ends before the first stop string.

    Args:
        stops: the stop strings.

    Attributes:
        met: whether one has come.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.met = False

    def passed(self, text: str) -> str:
        """What may go out now that some more text has come."""
        if self.met:
            return ""
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.met = True
            return self._take(min(found), drop=True)
        begun = max((self._begun(stop) for stop in self._stops), default=0)
        return self._take(len(self._held) - begun)

    def rest(self) -> str:
        """What was held back though no stop string came of it."""
        return "" if self.met else self._take(len(self._held))

    def _begun(self, stop: str) -> int:
        """Number of characters at the end that may be the beginning of a stop string."""
        return next(
            (n for n in range(min(len(stop) - 1, len(self._held)), 0, -1) if self._held.endswith(stop[:n])), 0
        )

    def _take(self, count: int, *, drop: bool = False) -> str:
        taken, self._held = self._held[:count], "" if drop else self._held[count:]
        return taken


def _prompt(tokenizer: Tokenizer, text: str, stop_tokens: frozenset[int], sequence_limit: int) -> list[int]:
    """Token ids of a text to go on from; a stop token that the tokenizer puts after each text would end it at once."""
    (ids,) = tokenizer.encode([Row(text)])
    while len(ids) > 1 and ids[-1] in stop_tokens:
        ids.pop()
    if len(ids) >= sequence_limit:
        raise DataError(
            f"the text has {sequence_limit} tokens or more, and with what is generated there may be {sequence_limit}; "
            "shorten it, or raise the limit by exporting the package with a larger --sequence-limit"
        )
    return ids
