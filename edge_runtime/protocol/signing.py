"""Ed25519 keys, signatures over bytes, and signatures over requests.

Requests are signed by one fixed profile of RFC 9421 (HTTP message signatures): the covered components are ``"@method"
"@path" "content-digest"``, in this order, with ``created``, ``nonce``, ``keyid`` (the device's id) and
``alg="ed25519"``. The body enters through its RFC 9530 ``Content-Digest`` in sha-256. Whatever does not fit the profile
to the letter is refused, so there is nothing to negotiate and little to parse.

Paths carry no query, because a query would not be covered.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Struct

from edge_runtime.durable import write_durably
from edge_runtime.errors import ConfigError, SignatureError

CONTENT_DIGEST = "Content-Digest"
SIGNATURE_INPUT = "Signature-Input"
SIGNATURE = "Signature"

#: Length of the longest header value that is parsed, in characters; signers of this project write about 250.
MAX_HEADER_CHARACTERS = 1024
MAX_KEY_FILE_BYTES = 4096

_KEY_BYTES = 32
_SIGNATURE_BYTES = 64
_COMPONENTS = '("@method" "@path" "content-digest")'
_INPUT_FORM = re.compile(
    re.escape(f"sig1={_COMPONENTS}") + r";created=(?P<created>[0-9]{1,12})"
    r';nonce="(?P<nonce>[A-Za-z0-9+/=_-]{8,64})"'
    r';keyid="(?P<device_id>[A-Za-z0-9][A-Za-z0-9._-]{0,127})"'
    r';alg="ed25519"'
)
_SIGNATURE_FORM = re.compile(r"sig1=:(?P<value>[A-Za-z0-9+/]{86}==):")
_DIGEST_FORM = re.compile(r"sha-256=:[A-Za-z0-9+/]{43}=:")


class PrivateKey:
    """An Ed25519 private key. Its text forms never show it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @property
    def public_key(self) -> str:
        """The public half: 32 bytes in standard base64."""
        return base64.b64encode(self._key.public_key().public_bytes_raw()).decode("ascii")

    def sign(self, data: bytes) -> str:
        """Signature over exactly ``data``: 64 bytes in standard base64."""
        return base64.b64encode(self._key.sign(data)).decode("ascii")

    def save(self, path: Path) -> None:
        """Write the key as unencrypted PKCS #8 PEM that only its owner may read (mode 0600).

        Raises:
            OSError: the file cannot be written; an older file of that name is then unchanged.
        """
        pem = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_durably(path, pem, mode=0o600)

    @classmethod
    def load(cls, path: Path) -> PrivateKey:
        """Read a key that :meth:`save` or ``openssl genpkey -algorithm ed25519`` wrote.

        Raises:
            ConfigError: the file cannot be read, or holds no unencrypted Ed25519 key.
        """
        try:
            with path.open("rb") as file:
                pem = file.read(MAX_KEY_FILE_BYTES)
        except OSError as error:
            raise ConfigError(
                f"cannot read the key file {path}: {error.strerror}; name the right one"
            ) from error
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{path} is not an unencrypted private key in PEM; restore it, or name the right one"
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"{path} holds a key of another kind; an Ed25519 key is needed")
        return cls(key)


def generate_key() -> PrivateKey:
    """A new key from the system's random source."""
    return PrivateKey(Ed25519PrivateKey.generate())


def verify(public_key: str, data: bytes, signature: str, *, what: str) -> None:
    """Check that ``public_key`` signed exactly ``data``.

    Args:
        public_key: public key, 32 bytes in base64.
        data: the signed bytes.
        signature: signature, 64 bytes in base64.
        what: name of the signed thing for the error, such as ``"package models/minilm"``.

    Raises:
        SignatureError: the key or signature is malformed, or the signature was made with another key or over other
            bytes.
    """
    key_bytes = _decode(public_key, _KEY_BYTES, what=f"the public key for {what}")
    signature_bytes = _decode(signature, _SIGNATURE_BYTES, what=f"the signature of {what}")
    try:
        Ed25519PublicKey.from_public_bytes(key_bytes).verify(signature_bytes, data)
    except (InvalidSignature, ValueError) as error:
        raise SignatureError(
            f"the signature of {what} was not made over these bytes by key {public_key}; "
            "fetch it again, and check that this is the key of whoever should have signed it"
        ) from error


class RequestSignature(Struct, frozen=True):
    """The signature headers of a request, parsed but not yet verified.

    Attributes:
        device_id: id that the signer claims.
        created_s: the signer's clock in seconds since 1970; whoever verifies decides which age is too old.
        nonce: value that the signer uses only once; whoever verifies remembers it until that age.
        content_digest: value of the ``Content-Digest`` header.
        signature: signature in base64.
    """

    device_id: str
    created_s: int
    nonce: str
    content_digest: str
    signature: str


def sign_request(
    key: PrivateKey, *, device_id: str, method: str, path: str, body: bytes, now_s: int, nonce: str
) -> dict[str, str]:
    """Headers that sign a request.

    Args:
        key: the device's key.
        device_id: id that the device got when it enrolled.
        method: HTTP method in capitals.
        path: path with its leading slash, without a query.
        body: content; empty for GET.
        now_s: time in seconds since 1970.
        nonce: 8 to 64 characters of base64, never used twice by this device.

    Raises:
        ValueError: a value does not fit the profile.
    """
    parameters = _parameters(device_id, now_s, nonce)
    if _INPUT_FORM.fullmatch(f"sig1={parameters}") is None:
        raise ValueError("the device id, time or nonce does not fit the signature profile")
    if not path.startswith("/") or "?" in path or "\n" in path or "\n" in method:
        raise ValueError("a signed path starts with a slash and has no query")
    digest = content_digest(body)
    signature = key.sign(_signature_base(method, path, digest, parameters))
    return {
        CONTENT_DIGEST: digest,
        SIGNATURE_INPUT: f"sig1={parameters}",
        SIGNATURE: f"sig1=:{signature}:",
    }


def parse_request_signature(headers: Mapping[str, str]) -> RequestSignature:
    """Read the signature headers of a request. Capitals in header names make no difference.

    Raises:
        SignatureError: a header is missing, too long, or does not fit the profile.
    """
    by_name = {name.lower(): value for name, value in headers.items()}
    parameters = _match(_INPUT_FORM, by_name, SIGNATURE_INPUT)
    signature = _match(_SIGNATURE_FORM, by_name, SIGNATURE)
    digest = _match(_DIGEST_FORM, by_name, CONTENT_DIGEST)
    return RequestSignature(
        device_id=parameters["device_id"],
        created_s=int(parameters["created"]),
        nonce=parameters["nonce"],
        content_digest=digest[0],
        signature=signature["value"],
    )


def verify_headers(public_key: str, signature: RequestSignature, *, method: str, path: str) -> None:
    """Check that ``public_key`` signed a request with this method, path and body digest, before its body is read.

    Age and nonce are for the caller to check, and the body with :func:`check_body` once it is here.

    Raises:
        SignatureError: the signature does not match the request.
    """
    parameters = _parameters(signature.device_id, signature.created_s, signature.nonce)
    base = _signature_base(method, path, signature.content_digest, parameters)
    what = f"request {method} {path} of device {signature.device_id}"
    verify(public_key, base, signature.signature, what=what)


def check_body(signature: RequestSignature, body_sha256: bytes) -> None:
    """Compare the digest of a body that was read with the one that was signed.

    Args:
        signature: signature of the request.
        body_sha256: sha256 of the body, 32 bytes.

    Raises:
        SignatureError: they differ.
    """
    if _digest_value(body_sha256) != signature.content_digest:
        raise SignatureError(
            f"the body of a request of device {signature.device_id} does not match its Content-Digest; send it again"
        )


def content_digest(body: bytes) -> str:
    """Value of the RFC 9530 ``Content-Digest`` header for ``body``."""
    return _digest_value(hashlib.sha256(body).digest())


def _digest_value(sha256: bytes) -> str:
    return f"sha-256=:{base64.b64encode(sha256).decode('ascii')}:"


def _parameters(device_id: str, created_s: int, nonce: str) -> str:
    return f'{_COMPONENTS};created={created_s};nonce="{nonce}";keyid="{device_id}";alg="ed25519"'


def _signature_base(method: str, path: str, digest: str, parameters: str) -> bytes:
    """The signed text of RFC 9421 section 2.5."""
    lines = (
        f'"@method": {method}',
        f'"@path": {path}',
        f'"content-digest": {digest}',
        f'"@signature-params": {parameters}',
    )
    return "\n".join(lines).encode()


def _match(form: re.Pattern[str], headers: Mapping[str, str], name: str) -> re.Match[str]:
    value = headers.get(name.lower())
    if value is None:
        raise SignatureError(f"the request has no {name} header; sign it with the device's key")
    if len(value) > MAX_HEADER_CHARACTERS:
        raise SignatureError(
            f"the {name} header has {len(value)} characters, over the limit of {MAX_HEADER_CHARACTERS}"
        )
    match = form.fullmatch(value)
    if match is None:
        raise SignatureError(f"the {name} header does not fit the signature profile; see docs/protocol.md")
    return match


def _decode(text: str, size: int, *, what: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise SignatureError(f"{what} is not base64") from error
    if len(data) != size:
        raise SignatureError(f"{what} has {len(data)} bytes; Ed25519 needs {size}")
    return data
