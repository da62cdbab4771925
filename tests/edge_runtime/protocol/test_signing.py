import hashlib
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.errors import ConfigError, SignatureError
from edge_runtime.protocol.signing import (
    PrivateKey,
    RequestSignature,
    check_body,
    generate_key,
    parse_request_signature,
    sign_request,
    verify,
    verify_headers,
)

KEY = generate_key()
OTHER_KEY = generate_key()
BODY = b'{"answer": 42}'
# Made with the private key bytes(range(32)), device "d1", time 17000, nonce "abcdefgh",
# POST /v1/x, body "hi".
RECORDED_KEY = "A6EHv/POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg="
RECORDED_SIGNATURE = (
    "Baca7pgcOHX5vArQa5ESq8wHoJjreVKHXCqsM7s8lP2qZ5WqUioa2mve4tYHJqiWTdySsdxPf1hd3AYuH2SkDA=="
)


def verify_request(key: str, signature: RequestSignature, *, method: str, path: str, body: bytes) -> None:
    """Both halves of a verification, in the order in which a server makes them."""
    verify_headers(key, signature, method=method, path=path)
    check_body(signature, hashlib.sha256(body).digest())


def signed(**changes: object) -> dict[str, str]:
    arguments = {
        "device_id": "d-1",
        "method": "POST",
        "path": "/v1/check-in",
        "body": BODY,
        "now_s": 1_790_000_000,
        "nonce": "abcdefghijkl",
    }
    return sign_request(KEY, **{**arguments, **changes})


@given(st.binary(max_size=300))
def test_a_signature_verifies_over_its_bytes(data: bytes) -> None:
    """What a key signs verifies with its public half."""
    verify(KEY.public_key, data, KEY.sign(data), what="data")


@given(st.binary(min_size=1, max_size=100), st.data())
def test_a_flipped_bit_is_noticed(data: bytes, draw: st.DataObject) -> None:
    """Changing any one bit of the signed bytes breaks the signature."""
    position = draw.draw(st.integers(0, len(data) * 8 - 1))
    changed = bytearray(data)
    changed[position // 8] ^= 1 << position % 8
    with pytest.raises(SignatureError):
        verify(KEY.public_key, bytes(changed), KEY.sign(data), what="data")


def test_the_error_names_the_thing_and_the_key() -> None:
    """A wrong signature is reported with what was signed, whose key was expected and what to do."""
    with pytest.raises(SignatureError, match="package little") as caught:
        verify(KEY.public_key, b"data", OTHER_KEY.sign(b"data"), what="package little")
    assert KEY.public_key in str(caught.value)
    assert "fetch it again" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "not base64!", "AAAA", KEY.public_key + "=="],
    ids=["empty", "not base64", "short", "padded twice"],
)
def test_malformed_keys_and_signatures_are_signature_errors(text: str) -> None:
    """Text that is not a key or a signature never reaches the cryptography."""
    with pytest.raises(SignatureError):
        verify(text, b"", KEY.sign(b""), what="data")
    with pytest.raises(SignatureError):
        verify(KEY.public_key, b"", text, what="data")


def test_a_saved_key_loads_and_only_its_owner_may_read_it(tmp_path) -> None:
    """Saving and loading gives the same key, in a file of mode 0600 without leftovers beside it."""
    path = tmp_path / "device.key"
    KEY.save(path)
    assert PrivateKey.load(path).public_key == KEY.public_key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [None, b"", b"not a key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n"])
def test_an_unusable_key_file_is_a_config_error(tmp_path, content: bytes | None) -> None:
    """A key file that is missing or malformed is named in the error."""
    path = tmp_path / "device.key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"device\.key"):
        PrivateKey.load(path)


def test_a_key_of_another_kind_is_refused(tmp_path) -> None:
    """An elliptic-curve key that is not Ed25519 is refused with the kind that is needed."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

    pem = generate_private_key(SECP256R1()).private_bytes(
        s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()
    )
    path = tmp_path / "key.pem"
    path.write_bytes(pem)
    with pytest.raises(ConfigError, match="Ed25519"):
        PrivateKey.load(path)


@given(st.binary(max_size=200), st.integers(0, 10**12 - 1))
def test_a_signed_request_verifies(body: bytes, now_s: int) -> None:
    """A request's headers parse back to who and when, and verify against method, path and body."""
    signature = parse_request_signature(signed(body=body, now_s=now_s))
    assert (signature.device_id, signature.created_s, signature.nonce) == ("d-1", now_s, "abcdefghijkl")
    verify_request(KEY.public_key, signature, method="POST", path="/v1/check-in", body=body)


@pytest.mark.parametrize(
    "change",
    [{"method": "PUT"}, {"path": "/v1/events"}, {"body": BODY + b" "}],
    ids=["method", "path", "body"],
)
def test_a_signature_covers_the_whole_request(change: dict[str, object]) -> None:
    """Another method, path or body under the same signature is refused."""
    request = {"method": "POST", "path": "/v1/check-in", "body": BODY, **change}
    with pytest.raises(SignatureError, match="d-1"):
        verify_request(KEY.public_key, parse_request_signature(signed()), **request)


@pytest.mark.parametrize("change", [{"now_s": 1}, {"nonce": "zyxwvutsrqpo"}, {"device_id": "d-2"}])
def test_time_nonce_and_device_are_covered(change: dict[str, object]) -> None:
    """The signature of one request does not fit another time, nonce or device."""
    headers = {**signed(), "Signature-Input": signed(**change)["Signature-Input"]}
    with pytest.raises(SignatureError):
        verify_request(
            KEY.public_key, parse_request_signature(headers), method="POST", path="/v1/check-in", body=BODY
        )


def test_header_names_have_no_case() -> None:
    """Headers are found however a proxy writes their names."""
    lower = {name.lower(): value for name, value in signed().items()}
    assert parse_request_signature(lower) == parse_request_signature(signed())


def test_the_recorded_request_verifies_forever() -> None:
    """A request signed by the first release verifies: the profile's text has not moved by a byte."""
    signature = RequestSignature(
        device_id="d1",
        created_s=17000,
        nonce="abcdefgh",
        content_digest="sha-256=:j0NDRmSPa5bfid2pAcUXaxCm2Dlh3TwayItZstwyeqQ=:",
        signature=RECORDED_SIGNATURE,
    )
    verify_request(RECORDED_KEY, signature, method="POST", path="/v1/x", body=b"hi")


@pytest.mark.parametrize("name", ["Content-Digest", "Signature-Input", "Signature"])
@pytest.mark.parametrize("value", [None, "", "x" * 2000, 'sig1=("@method");created=1'])
def test_headers_outside_the_profile_are_refused(name: str, value: str | None) -> None:
    """A missing, overlong or foreign signature header is refused by name."""
    headers = signed()
    if value is None:
        del headers[name]
    else:
        headers[name] = value
    with pytest.raises(SignatureError, match=name):
        parse_request_signature(headers)


@given(st.text(max_size=300), st.text(max_size=300), st.text(max_size=300))
def test_arbitrary_headers_never_raise_anything_else(first: str, second: str, third: str) -> None:
    """Whatever the headers hold, parsing ends in a SignatureError."""
    with pytest.raises(SignatureError):
        parse_request_signature({"Content-Digest": first, "Signature-Input": second, "Signature": third})


@pytest.mark.parametrize(
    "change", [{"path": "/v1/x?a=1"}, {"path": "v1"}, {"nonce": "short"}, {"device_id": 'd"1'}, {"now_s": -1}]
)
def test_what_the_profile_cannot_carry_is_not_signed(change: dict[str, object]) -> None:
    """Queries, bad nonces and quotes are refused before anything is signed."""
    with pytest.raises(ValueError, match="sign"):
        signed(**change)
