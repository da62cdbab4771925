"""``edge-runtime plan`` as an operator calls it, on a package that is read but never run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec.structs import replace

from edge_runtime import cli
from edge_runtime.errors import ConfigError, PackageError
from edge_runtime.package.manifest import SizeTerm
from edge_runtime.package.package import Package
from edge_runtime.package.prepared import prepared_beside
from edge_runtime.protocol.signing import generate_key
from tests.edge_runtime.packages import make_manifest, write_package, write_prepared

KEY = generate_key()
MIB = 1 << 20


@dataclass(frozen=True)
class Answer:
    """What a command left behind.

    Attributes:
        code: exit code.
        out: text on standard output.
        err: text on standard error.
    """

    code: int
    out: str
    err: str


@pytest.fixture
def package(tmp_path) -> Path:
    """The little package, its block's live set 256 KiB an example of 64 tokens."""
    manifest = make_manifest()
    block = manifest.programs["block"]
    live = ((SizeTerm(4096.0, 1, 1, 0), SizeTerm(4096.0, 1, 1, 1)),)
    variants = {name: replace(variant, live=live) for name, variant in block.variants.items()}
    (tmp_path / "package").mkdir()
    return write_package(
        tmp_path / "package", KEY, replace(manifest, programs={"block": replace(block, variants=variants)})
    )


@pytest.fixture
def plan(package, capsys):
    """Call the command on the little package."""

    def call(*options: str, folder: Path = package) -> Answer:
        code = cli.main(["plan", str(folder), *options])
        return Answer(code, *capsys.readouterr())

    return call


def test_a_plan_is_printed_with_its_parts(plan) -> None:
    """Work, way and every part of the predicted peak are told, and the parts add up to the peak."""
    answer = plan("--cap", "256M", "--sequence", "64")
    assert answer.code == 0
    assert "plan      weights resident, 4 examples and 1 draw at a time\ngiven up  nothing\n" in answer.out
    sizes = {
        name: float(size)
        for name, size in re.findall(r"^  (\w+) +(?:< )?([0-9.]+)  ", answer.out, flags=re.MULTILINE)
    }
    peak = sizes.pop("peak")
    assert set(sizes) == {"libraries", "tokenizer", "engine", "weights", "live", "waiting", "slices"}
    assert sum(sizes.values()) == pytest.approx(peak, abs=0.05)
    assert all(line == line.rstrip() and len(line) <= 100 for line in answer.out.splitlines())


def test_time_is_told_once_the_package_is_prepared(plan, package) -> None:
    """Without a prepared folder the step's time is not known; one beside the package is found by itself."""
    assert "time not known: it is not prepared for this machine" in plan("--cap", "256M").out
    sha256 = Package.open(package, KEY.public_key).sha256
    folder = write_prepared(prepared_beside(package), sha256)
    assert re.search(
        r"^step +[0-9.]+ (s|min|min [0-9]+ s), predicted$", plan("--cap", "256M").out, flags=re.MULTILINE
    )
    assert "predicted" in plan("--cap", "256M", "--prepared", str(folder)).out
    write_prepared(folder, sha256, cpu="another")
    assert "was prepared for the CPU another" in plan("--cap", "256M").out
    answer = plan("--cap", "256M", "--prepared", str(folder))
    assert (answer.code, answer.out) == (16, "")


def test_what_the_ladder_gave_up_is_told(plan) -> None:
    """Under a cap too small for the work as asked, a plan for less work says what it left out."""
    whole = plan("--cap", "256M", "--batch", "4096", "--sequence", "64")
    assert "given up  nothing" in whole.out
    answer = plan("--cap", "96M", "--batch", "4096", "--sequence", "64")
    assert answer.code == 0
    assert re.search(r"given up  sequences of \d+ tokens instead of 64", answer.out)


def test_a_cap_that_nothing_fits_names_the_cap_that_would(plan) -> None:
    """The exit code is CapExceededError's, and the cap that the one line names is indeed enough."""
    answer = plan("--cap", "64M")
    assert (answer.code, answer.out) == (13, "")
    needed = re.search(r"\nerror: the task needs a cap of (\d+) MiB", answer.err)
    assert needed is not None
    assert plan("--cap", f"{needed[1]}M").code == 0
    assert "given up  sequences" not in plan("--cap", f"{needed[1]}M").out


def test_other_sizes_are_tabled_with_the_chosen_one_marked(plan) -> None:
    """--what-if adds a table in which one row is the plan."""
    answer = plan("--cap", "100M", "--what-if")
    assert answer.code == 0
    assert answer.out.count("fits, chosen") == 1
    assert "streamed" in answer.out


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        (["--cap", "plenty"], 11, "'plenty' is not a size"),
        (["--cap", "0"], 11, "outside 1 to"),
        (["--cap", "256"], 11, 'a cap of 256 bytes is less than any program takes; did you mean "256M"?'),
        (["--cap", "10M"], 13, "the libraries alone takes"),
        (["--cap", "1G", "--sequence", "65"], 11, "--sequence is 65; package little takes 1 to 64 tokens"),
        (["--cap", "1G", "--sequence", "0"], 11, "--sequence is 0"),
        (["--cap", "1G", "--batch", "0"], 11, "--batch is 0; it may be 1 to 4096"),
        (["--cap", "1G", "--draws", "-1"], 11, "--draws is -1"),
        (["--cap", "1G", "--slices", "block9.key"], 32, "no slice 'block9.key'"),
        (["--cap", "1G", "--prepared", "/nonexistent"], 16, "cannot read /nonexistent"),
        (["--cap", "1G", "--publisher-key", generate_key().public_key], 35, "signature"),
    ],
)
def test_what_cannot_be_planned_is_one_clear_line(plan, options: list[str], code: int, named: str) -> None:
    """Each kind of bad input has its exit code and one line that names the option and its limit."""
    answer = plan(*options)
    assert (answer.code, answer.out) == (code, "")
    errors = [line for line in answer.err.splitlines() if not line.startswith("note: ")]
    assert len(errors) == 1
    assert named in errors[0]


def test_a_folder_that_is_no_package_is_named(plan, tmp_path) -> None:
    """A folder without a manifest ends the command with one line that names the file."""
    answer = plan("--cap", "1G", folder=tmp_path / "none")
    assert answer.code == 32
    assert re.fullmatch(r"error: cannot read .*none/manifest\.json: .*\n", answer.err)


def test_an_unchecked_signature_is_told_once(plan) -> None:
    """Without a key one note says that nobody checked the signature; with the right key there is none."""
    assert plan("--cap", "1G").err.count("the signature of") == 1
    assert plan("--cap", "1G", "--publisher-key", KEY.public_key).err == ""


def test_backpropagation_is_planned_with_its_own_words(plan, tmp_path) -> None:
    """With adjoint programs the plan tells where layer inputs wait; draws are refused, and so is a package without."""
    manifest = make_manifest()
    segments = tuple(replace(segment, adjoint="block") for segment in manifest.segments)
    (tmp_path / "with").mkdir()
    folder = write_package(tmp_path / "with", KEY, replace(manifest, segments=segments))
    answer = plan("--cap", "256M", "--update", "backprop", folder=folder)
    assert answer.code == 0
    assert "backpropagation, 1 slice and the head" in answer.out
    assert "layer inputs in memory, 4 examples at a time" in answer.out
    drawn = plan("--cap", "256M", "--update", "backprop", "--draws", "2", folder=folder)
    assert (drawn.code, "makes no draws" in drawn.err) == (ConfigError.exit_code, True)
    without = plan("--cap", "256M", "--update", "backprop")
    assert (without.code, "--with-adjoint" in without.err) == (PackageError.exit_code, True)


def test_a_package_is_planned_for_the_engine_that_is_named(plan) -> None:
    """The default engine may be named; one that the package has no programs for is refused with the way to get them."""
    assert plan("--cap", "256M", "--engine", "onnxruntime").out == plan("--cap", "256M").out
    without = plan("--cap", "256M", "--engine", "executorch")
    assert (without.code, without.out) == (32, "")
    assert "--engine onnxruntime,executorch" in without.err
