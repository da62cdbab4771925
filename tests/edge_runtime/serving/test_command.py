"""What the options of ``edge-runtime predict`` and ``serve`` become."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime import cli
from edge_runtime.errors import ConfigError
from edge_runtime.inference.requests import Sampling
from edge_runtime.serving import command, source


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a model's folder was asked for with, as text; nothing is opened."""
    calls: list[str] = []

    def stop(*given: object, **named: object) -> None:
        calls.append(f"{given} {named}")
        raise ConfigError("asked")

    monkeypatch.setattr(source, "model_of_folder", stop)
    return calls


def model_options(folder: Path) -> list[str]:
    """Every option by which a model is named, with values that can be told apart."""
    return [
        *("--package", str(folder / "package"), "--publisher-key", "KEY", "--slices", str(folder / "slices")),
        *("--cap", "257M", "--threads", "3"),
        *("--prepared", str(folder / "prepared"), "--engine", "executorch"),
    ]


@pytest.mark.parametrize("place", [["--socket", "s.sock"], ["--listen", "127.0.0.1:0"], []])
def test_every_option_of_serve_reaches_the_model(asked: list[str], tmp_path: Path, place: list[str]) -> None:
    """Package, key, slices, cap, threads, prepared folder and engine are handed on as given."""
    assert cli.main(["serve", *model_options(tmp_path), *place]) == 11
    (told,) = asked
    values = ("package", "KEY", "slices", str(257 << 20), "3", "prepared", "executorch")
    assert [value for value in values if value not in told] == []


def test_an_address_that_is_none_is_told(asked: list[str], tmp_path: Path, capsys) -> None:
    """--listen is looked at before the model is."""
    assert cli.main(["serve", *model_options(tmp_path), "--listen", "here"]) == 11
    assert "--listen 'here' must read HOST:PORT" in capsys.readouterr().err
    assert asked == []


def test_every_option_of_predict_is_handed_on(asked: list[str], tmp_path: Path, monkeypatch) -> None:
    """The model's options are those of serve, and sampling is what was asked for, each stop string in order."""
    sampled: list[Sampling] = []
    sampling = command._sampling
    monkeypatch.setattr(
        command, "_sampling", lambda arguments: sampled.append(sampling(arguments)) or sampled[-1]
    )
    more = ["--max-tokens", "7", "--temperature", "0.5", "--top-k", "4", "--top-p", "0.9", "--seed", "2"]
    words = ["predict", "a text", *model_options(tmp_path), *more, "--stop", "END", "--stop", "##"]
    assert cli.main(words) == 11
    assert "executorch" in asked[0]
    (found,) = sampled
    assert (found.max_tokens, found.temperature, found.top_k, found.top_p, found.seed) == (7, 0.5, 4, 0.9, 2)
    assert tuple(found.stop) == ("END", "##")


def test_serve_without_a_release_says_what_to_do(tmp_path: Path, capsys) -> None:
    """A configuration that cannot be read ends serve with its one line."""
    assert cli.main(["serve", "--config", str(tmp_path / "none.toml")]) == 11
    assert "cannot read the configuration" in capsys.readouterr().err
