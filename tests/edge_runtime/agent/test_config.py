import os
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.agent.config import DeviceConfig, load_config
from edge_runtime.config_file import parse_bytes
from edge_runtime.errors import ConfigError

EXAMPLE = Path(__file__).parents[3] / "devices" / "profiles" / "generic.toml"
LINES = {
    "coordinator_url": '"https://coordinator.example"',
    "state_folder": '"state"',
    "data": '"data.jsonl"',
    "device_name": '"board-1"',
    "device_class": '"generic"',
    "publisher_key": f'"{"A" * 43}="',
    "cap": '"256M"',
}


def write(folder: Path, **changes: str | None) -> Path:
    lines = {**LINES, **changes}
    path = folder / "device.toml"
    path.write_text("".join(f"{key} = {value}\n" for key, value in lines.items() if value is not None))
    return path


def test_the_example_configuration_loads() -> None:
    """The file that operators copy is a valid configuration."""
    config = load_config(EXAMPLE)
    assert config.cap == 512 << 20


def test_the_example_names_every_key() -> None:
    """The example mentions each key there is, as a value or as a comment."""
    text = EXAMPLE.read_text()
    missing = [field for field in DeviceConfig.__struct_fields__ if field not in text]
    assert missing == ["enrolment_token"] or not missing
    assert set(tomllib.loads(text)) <= set(DeviceConfig.__struct_fields__)


def test_relative_paths_count_from_the_configuration(tmp_path) -> None:
    """Paths in the file do not depend on where the program was started."""
    config = load_config(write(tmp_path, data='"/elsewhere/data.jsonl"'))
    assert config.state_folder == tmp_path / "state"
    assert config.data == Path("/elsewhere/data.jsonl")


def test_all_cores_unless_told_otherwise(tmp_path) -> None:
    """Zero threads, the default, are as many as this process may use; a number is taken as it stands."""
    config = load_config(write(tmp_path, threads="0"))
    assert config.engine_threads == len(os.sched_getaffinity(0))
    assert load_config(write(tmp_path, threads=None)).threads == 0
    assert load_config(write(tmp_path, threads="3")).engine_threads == 3


@pytest.mark.parametrize(("written", "size"), [("0", 0), ('"64M"', 64 << 20), (None, 256 << 20)])
def test_the_prefix_cache_may_be_sized_or_turned_off(tmp_path, written: str | None, size: int) -> None:
    """The cache has a size with a unit, a default, and zero to keep none."""
    assert load_config(write(tmp_path, prefix_cache=written)).prefix_cache == size


@pytest.mark.parametrize(
    ("written", "engine"),
    [(None, "onnxruntime"), ('"onnxruntime"', "onnxruntime"), ('"executorch"', "executorch")],
)
def test_the_engine_is_the_operators_choice(tmp_path, written: str | None, engine: str) -> None:
    """ONNX Runtime unless the file names the other engine."""
    assert load_config(write(tmp_path, engine=written)).engine == engine


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tread": "2"}, "tread"),
        ({"engine": '"tflite"'}, "engine"),
        ({"cap": None}, "cap"),
        ({"cap": '"lots"'}, "256M"),
        ({"cap": "1.5"}, "cap"),
        ({"cap": "true"}, "cap"),
        ({"cap": "0"}, "outside"),
        ({"threads": "-1"}, "threads"),
        ({"prefix_cache": '"-1M"'}, "prefix_cache"),
        ({"device_name": '"a b"'}, "device_name"),
        ({"publisher_key": '"short"'}, "publisher_key"),
        ({"data": "3"}, "data"),
        ({"enrolment_token": '"short"'}, "enrolment_token"),
        ({"coordinator_url": '"ftp://x"'}, "https://host"),
        ({"coordinator_url": '"https://x/prefix"'}, "no path"),
        ({"coordinator_url": '"https://user:secret@x"'}, "credentials"),
        ({"coordinator_url": '"https://x:notaport"'}, "not a URL"),
        ({"coordinator_url": '"http://coordinator.example"'}, "allow_insecure_http"),
    ],
)
def test_a_bad_key_is_named_with_its_file(tmp_path, changes: dict[str, str | None], named: str) -> None:
    """Whatever is wrong, the error names the file and the key or the limit."""
    with pytest.raises(ConfigError, match=r"device\.toml") as caught:
        load_config(write(tmp_path, **changes))
    assert named in str(caught.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8080", "[::1]:8080"])
def test_plain_http_to_this_machine_is_fine(tmp_path, host: str) -> None:
    """Loopback addresses need no TLS."""
    load_config(write(tmp_path, coordinator_url=f'"http://{host}"'))


def test_plain_http_elsewhere_must_be_asked_for(tmp_path) -> None:
    """An operator who says so aloud gets plain http."""
    load_config(write(tmp_path, coordinator_url='"http://10.0.0.2"', allow_insecure_http="true"))


@pytest.mark.parametrize("content", [b"= 1", b"\xff\xfe", b"#" * (1 << 20) + b"#"])
def test_a_file_that_is_not_toml_is_named(tmp_path, content: bytes) -> None:
    """Nonsense, other encodings and huge files are refused by name."""
    path = tmp_path / "device.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"device\.toml"):
        load_config(path)


def test_a_missing_file_is_named(tmp_path) -> None:
    """A path that leads nowhere is a ConfigError, not a traceback."""
    with pytest.raises(ConfigError, match=r"none\.toml"):
        load_config(tmp_path / "none.toml")


def test_the_token_may_come_from_a_file(tmp_path) -> None:
    """A token file is read without its final newline."""
    (tmp_path / "token").write_text("one-time-token-0001\n")
    config = load_config(write(tmp_path, enrolment_token_file='"token"'))
    assert config.read_enrolment_token() == "one-time-token-0001"


@pytest.mark.parametrize("content", [None, "", "short"])
def test_an_unusable_token_file_is_named(tmp_path, content: str | None) -> None:
    """A token file that is missing, empty or too short is a ConfigError that names it."""
    if content is not None:
        (tmp_path / "token").write_text(content)
    config = load_config(write(tmp_path, enrolment_token_file='"token"'))
    with pytest.raises(ConfigError, match="token"):
        config.read_enrolment_token()


def test_two_tokens_are_one_too_many(tmp_path) -> None:
    """Token and token file together are refused, since one would silently win."""
    path = write(tmp_path, enrolment_token_file='"token"', enrolment_token='"one-time-token-0001"')
    with pytest.raises(ConfigError, match="not both"):
        load_config(path)


@given(
    st.integers(1, 1 << 20),
    st.sampled_from([("", 0), ("K", 10), ("M", 20), ("g", 30)]),
    st.sampled_from(["", "iB", "B"]),
)
def test_sizes_count_in_powers_of_1024(number: int, unit: tuple[str, int], suffix: str) -> None:
    """Every way of writing a size gives the same number of bytes."""
    letter, power = unit
    assert parse_bytes(f"{number}{letter}{suffix}") == number << power
    assert parse_bytes(f"{number} {letter}{suffix}") == number << power


@given(st.text(max_size=12))
def test_other_text_is_a_config_error(text: str) -> None:
    """Arbitrary text gives a positive size or a ConfigError, and nothing else."""
    with suppress(ConfigError):
        assert parse_bytes(text) > 0
