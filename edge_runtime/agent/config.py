"""The device's configuration file, ``device.toml``: parsed, checked and complete before anything starts.

Example: ``devices/profiles/generic.toml``. An unknown key is an error, so that a typing mistake never
silently falls back to a default.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct

from edge_runtime.agent.eligibility import Eligibility, check_eligibility
from edge_runtime.config_file import MAX_SIZE_BYTES, ByteSize, parse_bytes, parse_cap, read_struct, read_toml
from edge_runtime.data.reading import Column, EvaluationShare, FunctionName, Part, Query, Reading
from edge_runtime.engines.choice import threads_or_all
from edge_runtime.engines.names import EngineName
from edge_runtime.errors import ConfigError
from edge_runtime.package.manifest import Arithmetic
from edge_runtime.protocol.addresses import is_loopback
from edge_runtime.protocol.messages import Identifier, PublicKey

MAX_TOKEN_BYTES = 1024


#: Keys that hold a number of bytes, which may be written with a unit: ``"256M"``.
_SIZES = ("cap", "max_blob_bytes", "disk_quota", "prefix_cache")
_MAY_BE_NOTHING = ("prefix_cache", "eligibility.least_free_disk")

Token = Annotated[str, Meta(min_length=16, max_length=128)]


class DeviceConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything an operator decides about a device.

    Attributes:
        coordinator_url: address of the coordinator, ``https://host[:port]``; plain http only to this machine or with
            ``allow_insecure_http``.
        state_folder: folder of the device's key, identity, downloads and unsent results.
        data: file of the device's examples, one JSON object a line: ``{"text": …, "label": …}``, or ``{"text": …}``
            alone for language modelling; or a table, by its ending ``.csv`` or ``.tsv``, whose first line names the
            columns. It never leaves the device, and may grow: each task reads what is there. A device that does not
            train may do without.
        device_name: name by which operators call the device; no two enrolled devices share one.
        device_class: name of the kind of device, such as ``"jetson-orin-nano"``; devices of one class have comparable
            memory.
        publisher_key: public key that must have signed packages.
        cap: memory granted to the training process.
        threads: number of threads of the inference engine; 0 takes as many as there are cores this process may use.
        enrolment_token: one-time token, needed until the device has enrolled.
        enrolment_token_file: file that holds the token; set this or ``enrolment_token``, not both.
        coordinator_public_key: public key that must have signed tasks; unset: the key that the coordinator presents at
            enrolment, pinned from then on.
        allow_insecure_http: whether plain http to other machines is accepted.
        max_blob_bytes: size of the largest single download.
        disk_quota: disk space that downloads may take in ``state_folder``.
        arithmetic: arithmetic in which packages are run: ``"row_int8"``, ``"block_int8"``, ``"block_int4"`` or
            ``"float"``, if the package has it; unset: the best here, measured once for each package. Measured times
            vary, so set it where equal seeds must give equal bits.
        prefix_cache: disk space that hidden states kept for later steps of a task may take in ``state_folder``; 0 keeps
            none.
        engine: inference engine that runs the programs: ``"onnxruntime"``, or ``"executorch"`` where that is installed,
            for packages exported for it.
        data_query: query that gives the rows where ``data`` is an SQLite database, with columns named ``text`` and
            ``label``: ``"SELECT body AS text, category AS label FROM messages"``. The database is opened for reading
            alone.
        data_function: function that gives the rows, ``"package.module:function"``. It is called in a worker, under its
            cap, with the path of ``data``, and gives rows one by one, such as ``{"text": …, "label": …}``. Its module
            is installed beside edge-runtime, or lies in ``function_folder``.
        function_folder: folder with the module of ``data_function``; unset: it is installed beside edge-runtime.
        text_column: name of the column of ``data`` that holds the text.
        label_column: name of the column of ``data`` that holds the label.
        evaluation_share: share of the rows that the device never trains on and checks releases with; which rows is
            decided by a key that it keeps, text by text. 0 checks with the rows that it trains on.
        train: whether the device takes tasks; one that does not only fetches releases, to use them.
        eligibility: when the device may work.
    """

    coordinator_url: str
    state_folder: Path
    device_name: Identifier
    device_class: Identifier
    publisher_key: PublicKey
    cap: ByteSize
    threads: Annotated[int, Meta(ge=0, le=256)] = 0
    enrolment_token: Token | None = None
    enrolment_token_file: Path | None = None
    coordinator_public_key: PublicKey | None = None
    allow_insecure_http: bool = False
    max_blob_bytes: ByteSize = 4 << 30
    disk_quota: ByteSize = 8 << 30
    arithmetic: Arithmetic | None = None
    prefix_cache: Annotated[int, Meta(ge=0, le=MAX_SIZE_BYTES)] = 256 << 20
    engine: EngineName = "onnxruntime"
    data: Path | None = None
    data_query: Query | None = None
    text_column: Column = "text"
    label_column: Column = "label"
    evaluation_share: EvaluationShare = 0.0
    train: bool = True
    eligibility: Eligibility = Eligibility()
    data_function: FunctionName | None = None
    function_folder: Path | None = None

    def reading(self, part: Part, split_key: bytes) -> Reading:
        """How the data file is read for a part of the work.

        Args:
            part: which rows.
            split_key: the device's key that decides which rows are for evaluation.
        """
        return Reading(
            self.data_query or "",
            self.text_column,
            self.label_column,
            part,
            self.evaluation_share,
            split_key.hex(),
            self.data_function or "",
            str(self.function_folder or ""),
        )

    @property
    def training_data(self) -> Path:
        """File of the rows to train on.

        Raises:
            ConfigError: the configuration names none.
        """
        if self.data is None:
            raise ConfigError(
                "a key is missing: data; or set train = false, and the device only fetches releases"
            )
        return self.data

    @property
    def engine_threads(self) -> int:
        """Threads of the inference engine, at least one."""
        return threads_or_all(self.threads)

    def read_enrolment_token(self) -> str:
        """The one-time token, from the configuration or the file it names.

        Raises:
            ConfigError: neither is set, or the file cannot be read or holds no token.
        """
        if self.enrolment_token is not None:
            return self.enrolment_token
        if self.enrolment_token_file is None:
            raise ConfigError(
                "this device has not enrolled and has no token; "
                "set enrolment_token or enrolment_token_file to one the coordinator issued"
            )
        try:
            with self.enrolment_token_file.open("rb") as file:
                text = file.read(MAX_TOKEN_BYTES).decode("ascii", "replace").strip()
            return msgspec.convert(text, Token)
        except OSError as error:
            raise ConfigError(
                f"cannot read enrolment_token_file {self.enrolment_token_file}: {error.strerror}"
            ) from error
        except msgspec.ValidationError as error:
            raise ConfigError(f"{self.enrolment_token_file} holds no enrolment token: {error}") from error


def load_config(path: Path) -> DeviceConfig:
    """Read ``device.toml``. Relative paths in it start from the folder it lies in.

    Raises:
        ConfigError: the file cannot be read or is not TOML, or a key is missing, unknown or out of its limits; names
            the file and the key.
    """
    table = read_toml(path)

    def resolve(kind: type, value: object) -> Path:
        return _path(kind, value, path.parent)

    try:
        sizes = {name: _size(name, table[name]) for name in _SIZES if name in table}
        config = read_struct({**with_sizes_in(table), **sizes}, DeviceConfig, dec_hook=resolve)
        check_eligibility(config.eligibility)
        if config.train:
            _ = config.training_data
        _check_url(config.coordinator_url, allow_insecure_http=config.allow_insecure_http)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if config.data_function is not None and config.data_query is not None:
        raise ConfigError(f"{path}: set data_function or data_query, not both")
    if config.enrolment_token is not None and config.enrolment_token_file is not None:
        raise ConfigError(f"{path}: set enrolment_token or enrolment_token_file, not both")
    return config


def with_sizes_in(table: dict[str, Any]) -> dict[str, Any]:
    """A table whose ``[eligibility]`` has its size in bytes.

    Raises:
        ConfigError: that is no size.
    """
    asked = table.get("eligibility")
    if not isinstance(asked, dict) or "least_free_disk" not in asked:
        return table
    size_bytes = _size("eligibility.least_free_disk", asked["least_free_disk"])
    return {**table, "eligibility": {**asked, "least_free_disk": size_bytes}}


def _size(name: str, value: object) -> int:
    if not isinstance(value, str | int):
        raise ConfigError(f"{name} is a {type(value).__name__}, not a size")
    try:
        if name == "cap":
            return parse_cap(value)
        return 0 if name in _MAY_BE_NOTHING and value == 0 else parse_bytes(value)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _path(kind: type, value: object, folder: Path) -> Path:
    """A path of the file, the one type that msgspec has to be told how to make."""
    if kind is not Path:
        raise NotImplementedError(kind)
    if not isinstance(value, str) or not value:
        raise ValueError("expected a path")
    return folder / Path(value).expanduser()


def _check_url(url: str, *, allow_insecure_http: bool) -> None:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"coordinator_url {url!r} is not a URL: {error}") from error
    if parts.scheme not in {"http", "https"} or not host:
        raise ConfigError(f"coordinator_url {url!r} must read https://host or https://host:port")
    if parts.path not in {"", "/"} or parts.query or parts.fragment or parts.username is not None:
        raise ConfigError(f"coordinator_url {url!r} must have no path, query or credentials")
    if parts.scheme == "http" and not allow_insecure_http and not is_loopback(host):
        raise ConfigError(
            f"coordinator_url {url!r} would send results in the clear; "
            "use https, or set allow_insecure_http = true if the network is trusted"
        )
