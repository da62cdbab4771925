"""Methods as run configurations: each is accepted, and published ones say what their paper says."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from coordinator.config import RunConfig, one_visit, read_run_config, run_config
from coordinator.rounds.row_slices import check_rows
from tests.edge_runtime.memory.test_plan import MODEL

EXAMPLES = Path(__file__).parents[2] / "examples"
METHODS = sorted((EXAMPLES / "methods").glob("*.toml"))


def read(name: str) -> RunConfig:
    """One of the examples."""
    return read_run_config(EXAMPLES / "methods" / f"{name}.toml")


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_accepted_and_listed(path: Path) -> None:
    """Every example is a configuration that can run, bears its file's name, and has a line in the table."""
    config = read_run_config(path)
    assert config.name == path.stem
    table = (EXAMPLES.parent / "docs/methods.md").read_text("utf-8")
    (line,) = [line for line in table.splitlines() if f"| `{path.name}` |" in line]
    for said in (config.update, f" {config.split} ", f" {config.report} "):
        assert said in line
    assert ("Yogi 0.01" in line) == (config.server_optimizer.slices.name == "yogi")
    if config.update != "backprop":
        assert f" {config.directions} " in line


def test_every_line_has_a_file() -> None:
    """The table names no file that is not there."""
    table = (EXAMPLES.parent / "docs/methods.md").read_text("utf-8")
    assert table.count(".toml` |") == len(METHODS) == 18


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_any_example_can_be_one_visit(path: Path) -> None:
    """What a method says of slices is put out of force by --one-visit, so that the run is taken as any other is."""
    visit = one_visit(read_run_config(path))
    plain = msgspec.to_builtins(visit)
    assert run_config({key: value for key, value in plain.items() if value is not None}) == visit
    check_rows(visit, MODEL, ())


@pytest.mark.parametrize("name", ["spry", "spry-per-iteration"])
def test_spry_as_published(name: str) -> None:
    """Normal directions, one draw, a perturbed head, AdamW at 1e-4, and FedYogi with Flower's constants."""
    config = read(name)
    assert (config.update, config.directions, config.draws, config.head) == (
        "forward",
        "gaussian",
        1,
        "perturbed",
    )
    assert (config.local_optimizer.name, config.local_optimizer.slice_rate) == ("adamw", 1e-4)
    for optimizer in (config.server_optimizer.slices, config.server_optimizer.head):
        assert (optimizer.name, optimizer.rate, optimizer.beta1, optimizer.beta2, optimizer.tau) == (
            "yogi",
            0.01,
            0.9,
            0.99,
            1e-3,
        )
    assert (config.epochs, config.steps, config.report) == (
        (1, 1000, "weights") if name == "spry" else (0, 1, "scalars")
    )
