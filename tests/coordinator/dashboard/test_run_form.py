"""A run's configuration as a form."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.config import RunConfig, run_config
from coordinator.dashboard import run_form
from coordinator.dashboard.run_form import FIRST, KEYS, PREFIX
from edge_runtime.errors import ConfigError
from edge_runtime.protocol.signing import generate_key
from tests.coordinator.conftest import RUN


def config_of(folder: Path, **changed: object) -> RunConfig:
    """A configuration whose package is a folder."""
    table = {**RUN, "package": str(folder), "publisher_key": generate_key().public_key, **changed}
    return run_config(table)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"slices": ["s0", "s1"], "head_split": True},
        {"slices": ["s0"], "selection_timeout_s": None},
        {"features": [0, 1], "head": "exact", "pooling": "mean"},
        {"server_optimizer": {"slices": {"name": "adam", "rate": "auto"}}, "split": "whole"},
        {"local_optimizer": {"name": "adamw", "slice_rate": 1e-3}, "jvp_limit": 2.5},
    ],
)
def test_a_configuration_survives_its_form(tmp_path: Path, changed: dict[str, object]) -> None:
    """A configuration written into a form's fields and read back is the same."""
    config = config_of(tmp_path, **changed)
    texts = run_form.texts_of(config)
    read, errors, back = run_form.read_form({PREFIX + path: text for path, text in texts.items()})
    assert errors == {}
    assert back == config
    assert {path: text for path, text in read.items() if text} == texts


def test_every_key_has_a_field_that_says_what_it_means() -> None:
    """The form has every key of the configuration, those of the first part in their order, each with its meaning."""
    fields = run_form.fields({}, {})
    assert {field.path for field in fields} == set(KEYS)
    assert [field.path for field in fields if field.is_first] == list(FIRST)
    assert all(len(field.meaning) > 10 and "``" not in field.meaning for field in fields)
    assert next(field for field in fields if field.path == "split").choices == ("cyclic", "whole")
    assert next(field for field in fields if field.path == "slices").choices == ()
    assert {field.path for field in fields if field.required} == {
        *("name", "package", "publisher_key", "rounds", "devices_per_round"),
        *(path for path, key in KEYS.items() if key.required),
    }


def test_a_message_is_put_beside_the_key_that_it_names() -> None:
    """A key with its value comes before others; a message that names none stands above all."""
    assert run_form.named_key("min_results = 3 exceeds devices_per_round = 2") in (
        "min_results",
        "devices_per_round",
    )
    assert run_form.named_key("package x: publisher_key = y") == "publisher_key"
    assert run_form.named_key("evaluation.data names x") == "evaluation.data"
    assert run_form.named_key("nothing of the kind") == ""


@pytest.mark.parametrize(
    "text", ["a = [", "[[[[", "x" * 10, "unknown = 1", "[server_optimizer]\nnothing = 1"]
)
def test_what_is_no_file_of_a_run_is_refused(text: str) -> None:
    """A file that is not TOML, or has other keys, is refused in one line."""
    with pytest.raises(ConfigError, match=r"^the file [^\n]*$"):
        run_form.read_text(text)
