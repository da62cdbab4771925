"""Bad configurations: one line that names file and key, and nothing written."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from coordinator.cli import main
from coordinator.simulation.config import merged, read_simulation_config
from tests.coordinator.simulation.conftest import BASE, Workshop

ARM = {"name": "ours", "package": "bigram"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sed": 1}, "unknown key 'sed'; did you mean 'seeds' or 'speed'"),
        ({"seeds": []}, r"seeds"),
        ({"seeds": [1, 1]}, "seeds names one seed twice"),
        ({"fleet": {"cap": "many"}}, "fleet.cap: 'many' is not a size"),
        ({"fleet": {"devices": 0}}, r"fleet.devices"),
        ({"fleet": {"colour": "red"}}, "fleet: unknown key 'colour'; there are: devices, cap"),
        ({"data": {"partition": "dirichlet"}}, "data.alpha is missing"),
        ({"data": {"alpha": 1.0}}, "data.alpha is read by"),
        ({"data": {"partition": "natural"}}, "data.rows_per_device must be 0"),
        ({"data": {"partition": "dirichlet", "alpha": 1.0}}, "no labels to mix"),
        ({"data": {"rows_per_device": 1000}}, "asks for 8000 rows"),
        ({"data": {"train": "gone.jsonl"}}, "cannot read the data file .*gone.jsonl"),
        ({"dropout": {"rate": 1.0}}, r"dropout.rate"),
        (
            {"speed": {"spread": "wild"}},
            "speed.spread: 'wild' is none of: 'equal', 'exponential', 'lognormal'",
        ),
        ({"run": {"seed": 3}}, "arm ours: run.seed is set by seeds; remove it"),
        ({"run": {"evaluation": {"data": "x"}}}, "run.evaluation.data is set by data.dev"),
        ({"run": {"rounds": 0}}, r"arm ours: .*rounds"),
        ({"run": {"stepps": 1}}, "arm ours: .*unknown key 'stepps'; did you mean 'steps'"),
        ({"run": {"devices_per_round": 9}}, "run.devices_per_round = 9 exceeds fleet.devices = 8"),
        ({"run": {"train_head": True}}, "arm ours: package bigram has no head"),
        ({"run": {"slices": ["other"]}}, "arm ours: slices names 'other'"),
        ({"run": {"update": "backprop"}}, "arm ours: package bigram has no adjoint programs"),
        ({"fleet": {"cap": "1M"}}, "arm ours: its smallest task needs"),
        ({"arms": [ARM, ARM]}, "two are called 'ours'"),
        ({"arms": [{"name": "a b", "package": "x"}]}, r"arms\[0\].name"),
        ({"arms": [{"name": "a", "package": "gone"}]}, "gone"),
        ({"comparison": {"head_only": "head"}}, "comparison.head_only names 'head', which is no arm"),
    ],
)
def test_a_bad_configuration_is_one_line_and_writes_nothing(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    """Whatever is wrong, the command ends with one line naming it, and the output folder is not made."""
    path, out = workshop.write(**changes), workshop.folder / "out"
    assert main(["simulate", str(path), "--output", str(out)]) not in (0, 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(said, error), error
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--arms", "theirs"], "no arm is called 'theirs'; there are ours"),
        (["--seeds", "7"], "seed 7 is not among seeds"),
        (["--threads", "-1"], "--threads -1 is less than 0"),
        (["--seeds", "x"], "--seeds x is not a list of numbers"),
    ],
)
def test_a_bad_option_is_one_line_and_writes_nothing(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    """An arm or a seed that the configuration does not have is named."""
    out = workshop.folder / "out"
    assert main(["simulate", str(workshop.write()), "--output", str(out), *options]) == 11
    assert said in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("text", ["name = ", "\xff"])
def test_a_file_that_is_no_toml_is_named(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    """Neither half a line nor bytes of another encoding get past the parser."""
    path = workshop.folder / "bad.toml"
    path.write_bytes(text.encode("latin-1"))
    assert main(["simulate", str(path), "--output", str(workshop.folder / "out")]) == 11
    assert f"{path} is not TOML" in capsys.readouterr().err
    assert main(["simulate", str(path) + "x", "--output", str(workshop.folder / "out")]) == 11
    assert "cannot read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row",
    [
        '{"text": 3}',
        '{"text": "a", "label": "b"}\n{"text": "a"}',
        '{"text": "a", "label": ["colour"]}',
        '{"text": "a", "owner": 3}',
        "{",
        "",
    ],
)
def test_a_bad_row_is_named_and_not_quoted(
    workshop: Workshop, capsys: pytest.CaptureFixture[str], row: str
) -> None:
    """Rows that cannot be used end the command with exit code 12 before anything is written."""
    (workshop.folder / "train.jsonl").write_text(row and row + "\n")
    assert main(["simulate", str(workshop.write()), "--output", str(workshop.folder / "out")]) == 12
    error = capsys.readouterr().err
    assert "train.jsonl" in error
    assert "colour" not in error
    assert not (workshop.folder / "out").exists()


def test_an_arm_is_laid_over_the_common_table(workshop: Workshop) -> None:
    """Tables within tables are merged key by key, other values are replaced."""
    below = {"a": 1, "b": {"c": 1, "d": {"e": 1}}}
    assert merged(below, {"b": {"c": 2, "d": {"f": 3}}}) == {"a": 1, "b": {"c": 2, "d": {"e": 1, "f": 3}}}
    run = {"server_optimizer": {"slices": {"rate": 0.5}}, "steps": 7}
    config = read_simulation_config(workshop.write(arms=[{**ARM, "run": run}]))
    made = config.run_of(config.arms[0], 4, "A" * 43 + "=")
    assert (made.seed, made.steps, made.rounds, made.min_devices) == (4, 7, BASE["run"]["rounds"], 8)
    assert (made.server_optimizer.slices.name, made.server_optimizer.slices.rate) == ("sgd", 0.5)
    assert made.evaluation is not None
    assert made.evaluation.data == str(workshop.folder / "dev.jsonl")


def test_owners_may_stand_beside_texts(workshop: Workshop) -> None:
    """A natural partition simulates one device for each owner."""
    rows = [{"text": "the cat sat", "owner": f"o{number % 3}"} for number in range(12)]
    (workshop.folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"partition": "natural", "rows_per_device": None}
    (record,) = workshop.simulate(data=data, fleet={"devices": 3})
    assert record.status == "finished"
