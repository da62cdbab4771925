"""Predictions at a depth: behind a named exit, or behind the first whose label is sure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_runtime.cli import main
from edge_runtime.errors import CapExceededError, ConfigError, SliceError
from edge_runtime.memory.meter import Meter
from edge_runtime.memory.plan import Plan, Planner, Work
from edge_runtime.package.block_head import exits_of, head_of, with_block_head
from edge_runtime.package.package import Package
from edge_runtime.package.slices import encode_values
from edge_runtime.protocol.signing import generate_key
from edge_runtime.serving.source import model_of_folder
from edge_runtime.worker.inference import open_model
from tests.edge_runtime.exit_model import start_values, write_exit_model

TEXT = "the cat sat home"


class Trained:
    """A package, values of a run with exits, and the command that predicts by them."""

    def __init__(self, folder: Path) -> None:
        self.folder, key = folder, generate_key()
        self.package: Package = write_exit_model(folder / "package", key)
        self.key = key.public_key
        seen = with_block_head(self.package.manifest, (2,), exits=(1, 2))
        (folder / "values").write_bytes(encode_values(start_values(0.7), seen))
        seen = with_block_head(self.package.manifest, (2,))
        (folder / "plain").write_bytes(encode_values(start_values(0.7), seen))

    def predict(self, *more: str, values: str = "values") -> int:
        given = ["--package", str(self.folder / "package"), "--publisher-key", self.key, "--cap", "512M"]
        kept = [
            "--prepared",
            str(self.folder / "prepared"),
            "--slices",
            str(self.folder / values),
            "--threads",
            "1",
        ]
        return main(["predict", TEXT, *given, *kept, *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("depth"))


def test_a_text_leaves_where_it_is_told_or_where_it_is_sure(trained: Trained, capfdbinary: Any) -> None:
    """Exit 1 and exit 2 give their own labels; auto gives those of the first that is sure enough, or of the last."""

    def said(*more: str, values: str = "values") -> dict[str, Any]:
        assert trained.predict(*more, values=values) == 0
        return json.loads(capfdbinary.readouterr().out)

    shallow, deep = said("--depth", "1"), said("--depth", "2")
    assert (shallow["depth"], deep["depth"]) == (1, 2)
    assert shallow["probabilities"] != deep["probabilities"]
    assert said()["probabilities"] == said(values="plain")["probabilities"] == deep["probabilities"]
    sure = max(shallow["probabilities"].values())
    early = said("--depth", "auto", "--confidence", f"{sure - 1e-6}")
    assert (early["depth"], early["probabilities"]) == (1, shallow["probabilities"])
    late = said("--depth", "auto", "--confidence", "1")
    assert late["depth"] == 2
    np.testing.assert_allclose(
        list(late["probabilities"].values()), list(deep["probabilities"].values()), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("given", "values", "message"),
    [
        (("--depth", "3"), "values", "--depth is 3, and these values have the exits 1, 2; take one, or auto"),
        (("--depth", "auto"), "plain", "were trained without exits, so --depth has none to choose"),
        (("--depth", "1", "--confidence", "0.5"), "values", "--confidence goes with --depth auto"),
        (
            ("--depth", "auto", "--confidence", "0"),
            "values",
            "--confidence is 0.0, must be above 0 and at most 1",
        ),
    ],
)
def test_a_depth_that_is_not_there_is_one_line(
    trained: Trained, capsys: pytest.CaptureFixture[str], given: tuple[str, ...], values: str, message: str
) -> None:
    """An exit that the values lack, values without exits, and a confidence that means nothing start no worker."""
    assert trained.predict(*given, values=values) == ConfigError.exit_code
    assert message in capsys.readouterr().err


def test_the_deepest_exit_that_fits_the_cap_is_the_last(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the model up to the last exit needs more than the cap, auto ends before it; a named one is refused."""
    choose = Planner.choose

    def refuse_deep(planner: Planner, work: Work, budget_bytes: int) -> Plan:
        if planner.manifest.head_blocks == (2,):
            raise CapExceededError("too deep", required_bytes=2, cap_bytes=1)
        return choose(planner, work, budget_bytes)

    ample_bytes = 64 << 30  # this process, torch and all, is what the plan takes for an empty worker
    model = model_of_folder(
        trained.folder / "package",
        trained.folder / "values",
        trained.key,
        ample_bytes,
        1,
        "onnxruntime",
        None,
    )
    model = replace(model, prepared_folder=trained.folder / "prepared")
    model.prepare()
    monkeypatch.setattr(Planner, "choose", refuse_deep)
    assert open_model(model.at_depth("auto", 0.9).job(), Meter()).exits == (1,)
    with pytest.raises(CapExceededError):
        open_model(model.at_depth("2", 0.9).job(), Meter())


def test_values_tell_their_exits(trained: Trained) -> None:
    """A file of values of a run with exits names them; others name none, and damaged ones are refused."""
    data = (trained.folder / "values").read_bytes()
    assert exits_of(data) == (1, 2)
    assert head_of(data) == ((2,), "package") or head_of(data)[0] == (2,)
    assert exits_of((trained.folder / "plain").read_bytes()) == ()
    with pytest.raises(SliceError):
        exits_of(b"\x02" + bytes(7) + b"[]")
