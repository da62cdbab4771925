"""``edge-runtime profile``: real workers on a tiny package, and how their figures become a report."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import jsonschema
import msgspec
import pytest
from msgspec.structs import replace

from docs.generate.outputs import schema_of
from edge_runtime import cli
from edge_runtime.errors import OutOfMemoryError
from edge_runtime.memory.plan import ExecutionChoice, Planner, Work
from edge_runtime.package.manifest import PeakTensor, SizeTerm
from edge_runtime.package.prepared import PREPARED, prepared_beside
from edge_runtime.profile import run
from edge_runtime.profile.document import Profile, decode_profile
from edge_runtime.profile.facts import (
    LEAK_BYTES_PER_STEP,
    LOADING,
    MOST_WARM_UP_STEPS,
    bins,
    growth,
    phase_peaks,
    step_seconds,
    tensor_words,
    tensors,
)
from edge_runtime.profile.measure import Observer, Settings
from edge_runtime.profile.request import parse_request
from edge_runtime.profile.run import profile_package
from edge_runtime.profile.text import render_text
from edge_runtime.protocol.signing import generate_key
from edge_runtime.worker.jobs import BinMeasure, StepMeasure
from edge_runtime.worker.process import start_worker
from tests.edge_runtime.local import write_labelled_rows
from tests.edge_runtime.memory.test_enforcement import GROWING, WORKER
from tests.edge_runtime.packages import make_manifest, write_package

MIB = 1 << 20
KEY = generate_key()
QUERY = "encoder.layer.1.attention.self.query"


@dataclass(frozen=True)
class Answer:
    """What a command left behind.

    Attributes:
        code: exit code.
        out: text on standard output.
        err: text on standard error.
        profile: the report; None if none was written.
    """

    code: int
    out: str
    err: str
    profile: Profile | None


@pytest.fixture
def data(tmp_path) -> Path:
    """Eight rows of real text with labels in turn."""
    return write_labelled_rows(tmp_path / "data.jsonl")


@pytest.fixture
def profile(exported, prepared_in, data, tmp_path, capsys):
    """Call the command on the tiny package; it writes ``out/report.*``."""
    folder, prepared = exported.package.folder, prepared_in[exported.package.manifest.arithmetics[0]].folder
    (tmp_path / "out").mkdir()

    def call(*options: str, cap: str = "256M") -> Answer:
        words = ["profile", str(folder), "--cap", cap, "--data", str(data), "--prepared", str(prepared)]
        code = cli.main([*words, "--output", str(tmp_path / "out" / "report"), "--threads", "1", *options])
        path = tmp_path / "out" / "report.json"
        return Answer(
            code, *capsys.readouterr(), decode_profile(path.read_bytes()) if path.exists() else None
        )

    return call


def test_a_task_is_profiled(profile, exported, tmp_path) -> None:
    """The three files say the same of a real run: its phases, its bins, its steps and what it is compared with."""
    answer = profile("--steps", "30", "--draws", "2")
    assert answer.code == 0
    assert answer.out.startswith("PASS  measured ")
    found = answer.profile
    assert [phase.name for phase in found.phases] == ["start", "load", "step", "serialise"]
    assert all(phase.peak_bytes and phase.seconds > 0 for phase in found.phases[:3])
    assert found.is_explained
    assert found.peak_bytes == max(phase.peak_bytes for phase in found.phases)
    assert (found.work.steps, found.work.batch_size, found.work.draws) == (30, 8, 2)
    assert len(found.work.slices) == len(exported.package.manifest.slices) - 1
    assert [way.name for way in found.comparisons] == ["this task", "inference alone"]
    assert found.comparisons[0].step_s == found.step_s > 0
    assert found.growth.steps == 24
    assert found.measuring.samples >= len(found.timeline) > 2
    assert sum(option.chosen for option in found.what_if) == 1
    assert found.identity.package_sha256 == exported.package.sha256
    assert found.identity.command.startswith("edge-runtime profile ")
    text = (tmp_path / "out" / "report.txt").read_text()
    assert text == render_text(found)
    assert text.startswith(answer.out.partition("\nnote: ")[0])
    assert "<h1>Memory budget of " in (tmp_path / "out" / "report.html").read_text()
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_less_data_than_asked_for_is_told(profile, data) -> None:
    """Rows shorter than the sequence, and fewer than the batch, make the work smaller, and notes say so."""
    data.write_text('{"text": "good", "label": "good"}\n' * 8)
    answer = profile("--steps", "3", "--batch", "50", "--slices", f"{QUERY},head", "--json")
    found = answer.profile
    jsonschema.Draft202012Validator(schema_of("profile")).validate(json.loads(answer.out))
    assert decode_profile(answer.out.encode()) == found
    assert found.work.batch_size == 8
    assert found.work.sequence < 32
    assert found.work.slices == (QUERY,)
    notes = " ".join(found.notes)
    assert "The data has 8 rows" in notes
    assert f"The longest row has {found.work.sequence} tokens" in notes
    assert "No leak check" in notes
    assert "--model FOLDER" in notes


def test_the_command_itself_loads_no_engine(exported, prepared_in, data, tmp_path) -> None:
    """A whole run leaves the command's own process without numpy, the engine and torch: only workers have them."""
    prepared = prepared_in[exported.package.manifest.arithmetics[0]].folder
    program = (
        "import sys; from edge_runtime.cli import main; assert main(sys.argv[1:]) == 0\n"
        "assert not {'numpy', 'onnxruntime', 'tokenizers', 'torch'} & set(sys.modules)"
    )
    words = ["profile", str(exported.package.folder), "--cap", "256M", "--data", str(data), "--steps", "2"]
    words += ["--prepared", str(prepared), "--output", str(tmp_path / "report")]
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_how_the_work_is_done_can_be_forced(profile) -> None:
    """Streamed weights and a micro-batch from the command line are what ran, and the report says they were forced."""
    found = profile("--steps", "3", "--weights", "streamed", "--micro-batch", "3").profile
    assert (found.work.weights, found.work.micro_batch) == ("streamed", 3)
    assert any("forced" in note for note in found.notes)
    (chosen,) = [option for option in found.what_if if option.chosen]
    assert (chosen.weights, chosen.micro_batch) == ("streamed", 3)


def test_a_report_is_compared_with_an_earlier_one(profile, tmp_path) -> None:
    """The same run again is no regression; against half its peak it is, with an exit code of its own."""
    first = profile("--steps", "3")
    old = tmp_path / "old.json"
    document = json.loads((tmp_path / "out" / "report.json").read_bytes())
    old.write_text(json.dumps(document))
    same = profile("--steps", "3", "--against", str(old), "--tolerance", "0.2")
    assert same.code == 0
    assert "\nNo regression: the peak stays within" in same.out
    assert "No regression" in (tmp_path / "out" / "report.txt").read_text()
    document["peak_bytes"] = first.profile.peak_bytes // 2
    old.write_text(json.dumps(document))
    worse = profile("--steps", "3", "--against", str(old))
    assert worse.code == 18
    assert worse.err.splitlines()[-1].startswith("error: REGRESSED: the peak grew by more than 5.0 %")
    assert "REGRESSED" in (tmp_path / "out" / "report.html").read_text()


def test_an_earlier_report_of_other_work_is_refused_after_measuring(profile, tmp_path) -> None:
    """What was measured is written without the comparison, and the one line says what differs."""
    profile("--steps", "3")
    old = (tmp_path / "out" / "report.json").rename(tmp_path / "old.json")
    answer = profile("--steps", "3", "--draws", "2", "--against", str(old))
    assert answer.code == 11
    assert "draws was 1, is 2" in answer.err
    assert answer.profile.work.draws == 2


def test_backpropagation_is_compared_where_torch_is(profile, tiny_model) -> None:
    """With the model's folder the report has a row of PyTorch on the same slices, larger than ours."""
    found = profile("--steps", "3", "--model", str(tiny_model)).profile
    (way,) = [way for way in found.comparisons if way.name == "backpropagation (PyTorch)"]
    assert way.peak_bytes > found.peak_bytes
    assert way.step_s > 0
    assert not any("Backpropagation" in note for note in found.notes)


def test_backpropagation_is_profiled(profile) -> None:
    """--update backprop trains by the package's adjoint programs, and the report says so."""
    found = profile("--steps", "2", "--update", "backprop").profile
    assert found.work.update == "backprop"
    assert found.step_s > 0


@pytest.mark.parametrize("damage", ["missing", "malformed", "of another package"])
def test_a_prepared_folder_that_cannot_be_used_is_made_as_the_message_says(
    exported, prepared_in, data, tmp_path, capsys, damage: str
) -> None:
    """``plan --prepared`` names what prepares the folder; once ``profile`` has, it plans with times."""
    folder = tmp_path / "prepared"
    if damage != "missing":
        shutil.copytree(prepared_in[exported.package.manifest.arithmetics[0]].folder, folder)
        text = (folder / PREPARED).read_text()
        other = text.replace(exported.package.sha256, "0" * 64)
        (folder / PREPARED).write_text("{" if damage == "malformed" else other)
    words = [str(exported.package.folder), "--cap", "256M", "--prepared", str(folder)]
    assert cli.main(["plan", *words]) == 16
    assert "'edge-runtime profile' in its --prepared" in capsys.readouterr().err
    more = ["--data", str(data), "--steps", "1", "--threads", "1", "--output", str(tmp_path / "report")]
    assert cli.main(["profile", *words, *more]) == 0
    assert cli.main(["plan", *words]) == 0


def test_a_folder_that_is_no_model_leaves_the_row_out(profile, tmp_path) -> None:
    """The child's one line becomes a note, and the report stands."""
    answer = profile("--steps", "3", "--model", str(tmp_path))
    assert answer.code == 0
    assert any("is not a Hugging Face model folder" in note for note in answer.profile.notes)


def test_a_killed_task_is_reported_until_then(exported, prepared_in, data, tmp_path) -> None:
    """A worker that the kernel ends at its cap leaves a report: FAIL, with the timeline up to there."""
    prepared = prepared_in[exported.package.manifest.arithmetics[0]].folder
    request = parse_request(
        exported.package.folder,
        "160M",
        batch=8,
        sequence=None,
        draws=1,
        slices=None,
        update="forward",
        publisher_key=exported.key.public_key,
        prepared_folder=prepared,
    )
    settings = Settings(
        request, data, 5, 1, tmp_path / "report", "edge-runtime profile", prepared_folder=prepared
    )
    program = [sys.executable, "-c", WORKER.format(body=GROWING)]
    report = profile_package(settings, lambda job: start_worker(job, program))
    found = decode_profile((tmp_path / "report.json").read_bytes())
    assert isinstance(report.error, OutOfMemoryError)
    assert (found.verdict, found.killed) == ("FAIL", True)
    assert "killed" in found.failures
    assert found.timeline[-1].phase == "step"
    assert found.highest_sample.resident_bytes == found.peak_bytes > 100 * MIB
    assert found.step_s is None
    assert found.growth is None
    assert {bin_.measured_bytes for bin_ in found.bins} == {None}
    assert "No part was measured." in render_text(found)
    assert any("ran out of memory in phase step" in note for note in found.notes)
    assert found.comparisons[0].note == "killed by the kernel"


#: The real worker, which keeps a MiB of each step.
LEAKING = """
import sys
from edge_runtime.training import loop
from edge_runtime.worker import main as worker
draw_batches, kept = loop.draw_batches, []
class Leaking(list):
    def __iter__(self):
        for rows in super().__iter__():
            kept.append(bytearray(b"x") * (1 << 20))
            yield rows
loop.draw_batches = lambda *given, **named: Leaking(draw_batches(*given, **named))
sys.exit(worker.main())
"""


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        (WORKER.format(body="import signal; os.kill(os.getpid(), signal.SIGKILL)"), 14, "killed by SIGKILL"),
        (WORKER.format(body=GROWING), 15, "ran out of memory in phase step"),
        (LEAKING, 17, "did not keep to its budget"),
    ],
    ids=["killed", "over its cap", "leaking"],
)
def test_what_ends_the_worker_ends_the_command(
    profile, monkeypatch, program: str, code: int, said: str
) -> None:
    """A worker that is killed from outside, one that meets its cap and one that leaks have exit codes of their own."""
    words = [sys.executable, "-c", program]
    monkeypatch.setattr(
        run,
        "profile_package",
        lambda settings: profile_package(settings, lambda job: start_worker(job, words)),
    )
    answer = profile("--steps", "30", cap="160M" if code == 15 else "256M")
    assert answer.code == code
    last = answer.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        (["--steps", "0"], 11, "--steps is 0"),
        (["--threads", "0"], 11, "--threads is 0; it may be 1 to 256"),
        (["--micro-batch", "9"], 11, "--micro-batch is 9; it may be 1 to 8"),
        (["--tolerance", "-1"], 11, "--tolerance is -1.0"),
        (["--tolerance", "nan"], 11, "--tolerance is nan"),
        (["--model", "/nonexistent"], 11, "--model /nonexistent is not a folder"),
        (["--against", "/nonexistent"], 11, "cannot read the earlier report /nonexistent"),
        (["--output", "/nonexistent/report"], 11, "there is no folder /nonexistent"),
        (["--data", "/nonexistent"], 12, "cannot read the data file /nonexistent"),
        (["--data", "/dev/null"], 12, "/dev/null is empty"),
        (["--prepared", "."], 11, "holds no prepared package, and would be replaced"),
        (["--sequence", "65"], 11, "--sequence is 65"),
        (["--engine", "executorch"], 32, "--engine onnxruntime,executorch"),
        (["--cap", "1M"], 13, "the libraries alone takes"),
    ],
)
def test_what_cannot_be_profiled_is_refused_before_anything_runs(
    tmp_path, data, capsys, options: list[str], code: int, named: str
) -> None:
    """Each kind of bad input is one clear line, and nothing is written or prepared."""
    folder = tmp_path / "package"
    folder.mkdir()
    words = ["profile", str(write_package(folder, KEY)), "--cap", "256M", "--data", str(data)]
    words += ["--publisher-key", KEY.public_key, "--output", str(tmp_path / "report"), *options]
    assert cli.main(words) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert named in err
    assert not list(tmp_path.glob("report*"))
    assert not prepared_beside(folder).exists()


def test_a_damaged_package_is_refused(tmp_path, data, capsys) -> None:
    """A file that is not what the manifest lists is named before a worker maps it."""
    folder = tmp_path / "package"
    folder.mkdir()
    write_package(folder, KEY)
    (folder / "weights/block.bin").write_bytes(bytes(63) + b"x")
    words = ["profile", str(folder), "--cap", "256M", "--data", str(data)]
    assert cli.main([*words, "--output", str(tmp_path / "report")]) == 34
    assert "block.bin" in capsys.readouterr().err


# --- from figures to the report -------------------------------------------------------------------------------


def steps_of(sizes: list[int], stride: int = 1, seconds: float = 0.5) -> list[StepMeasure]:
    """Steps that end every half second, as an account keeps them."""
    return [StepMeasure(i * stride * seconds, size + i * MIB, size) for i, size in enumerate(sizes)]


def test_a_step_takes_the_median_after_the_warm_up() -> None:
    """Slow first steps do not count, nor does one that was held up; kept steps may lie several apart."""
    ends = [0.0, 5.0, 10.0, *(10.0 + 0.5 * i for i in range(1, 18))]
    assert step_seconds([StepMeasure(end, 1) for end in ends], 20) == pytest.approx(0.5)
    assert step_seconds(steps_of([1] * 50, stride=4), 200) == pytest.approx(0.5)
    assert step_seconds(steps_of([1]), 1) is None
    assert step_seconds([], 0) is None


def test_a_leak_is_found_and_a_plateau_is_none() -> None:
    """Anonymous memory that grows with each step leaks; growth during the warm-up or of files does not."""
    leaking = growth(steps_of([100 * MIB + i * 20_000 for i in range(100)]), 100)
    assert leaking.leaks
    assert leaking.per_step_bytes == pytest.approx(20_000)
    assert (leaking.steps, leaking.warm_up) == (80, MOST_WARM_UP_STEPS)
    plateau = growth(steps_of([min(i, 20) * MIB for i in range(100)]), 100)
    assert not plateau.leaks
    assert plateau.per_step_bytes == pytest.approx(0)
    assert plateau.limit_per_step_bytes == LEAK_BYTES_PER_STEP


def test_a_leak_is_found_among_steps_that_were_thinned_out() -> None:
    """The slope is per step, also where only every fourth step was kept."""
    kept = steps_of([100 * MIB + 4 * i * 20_000 for i in range(500)], stride=4)
    found = growth(kept, 2000)
    assert found.per_step_bytes == pytest.approx(20_000)
    assert found.steps == 1980


def test_noise_is_no_leak() -> None:
    """Memory that breathes by megabytes over few steps raises the limit, since its slope means nothing."""
    sizes = [100 * MIB + (i % 7) * MIB for i in range(30)]
    found = growth(steps_of(sizes), 30)
    assert found.limit_per_step_bytes > LEAK_BYTES_PER_STEP
    assert not found.leaks
    assert growth(steps_of(sizes[:20]), 20) is None


def test_bins_add_up_whichever_phase_owns_the_peak() -> None:
    """Where loading took more than any step, the difference is a bin of its own, predicted and measured."""
    peak = Planner(make_manifest()).predict(Work(1, 8, 1, ()), ExecutionChoice("resident", 1, 1))
    measured = [BinMeasure("libraries", 50), BinMeasure("live", 30)]
    plain = bins(peak, measured, {"load": 60, "step": 80})
    assert [bin_.name for bin_ in plain] == list(peak.parts)
    assert sum(bin_.measured_bytes or 0 for bin_ in plain) == 80
    late = bins(replace(peak, load_bytes=peak.total_bytes + 7), measured, {"load": 95, "step": 80})
    assert (late[-1].name, late[-1].predicted_bytes, late[-1].measured_bytes) == (LOADING, 7, 15)
    assert {bin_.measured_bytes for bin_ in bins(peak, (), {"load": 95})} == {None}


def test_phases_come_in_the_order_they_were_entered() -> None:
    """Each lasts until the next begins; one that nobody saw has a mark and no length."""
    found = phase_peaks(
        {"step": 3, "start": 1, "load": 2, "upload": 4}, {"start": 0.0, "load": 1.0, "step": 1.5}, 4.0
    )
    assert [(phase.name, phase.peak_bytes, phase.seconds) for phase in found] == [
        ("start", 1, 1.0),
        ("load", 2, 0.5),
        ("step", 3, 2.5),
        ("upload", 4, 0.0),
    ]


def test_tensors_are_those_of_the_program_that_holds_most() -> None:
    """Sizes and shapes are the plan's, largest first; a package that does not tell has none."""
    manifest = make_manifest()
    plan = Planner(manifest).plan(Work(8, 16, 4, ("block0.query",)), ExecutionChoice("resident", 2, 3))
    assert tensors(Planner(manifest), plan) == ()
    block = manifest.programs["block"]
    variant = replace(
        block.variants["float"],
        live=((SizeTerm(4.0, 1, 1),),),
        peak_tensors=(
            PeakTensor("small", "Add", ("batch", "sequence"), SizeTerm(4.0, 1, 1)),
            PeakTensor("dot", "MatMul", ("draws", "batch*sequence", "8", "odd"), SizeTerm(32.0, 1, 1, 1)),
        ),
    )
    told = replace(manifest, programs={"block": replace(block, variants={"float": variant})})
    found = tensors(Planner(told), plan)
    assert [(t.name, t.operator, t.shape, t.bytes, t.program) for t in found] == [
        ("dot", "MatMul", "3 × 32 × 8 × odd", 32 * 2 * 16 * 3, "block"),
        ("small", "Add", "2 × 16", 4 * 2 * 16, "block"),
    ]


@pytest.mark.parametrize(
    ("operator", "shape", "words"),
    [
        ("GatherBlockQuantized", ("batch", "sequence", "384"), "embeddings of the tokens"),
        ("LayerNormalization", ("batch", "sequence", "384"), "normalised activations"),
        ("QuantizeLinear", ("draws*batch*sequence", "384"), "tangents of activations rounded to int8"),
        (
            "MatMulIntegerToFloat",
            ("draws", "batch", "sequence", "1536"),
            "tangents of a linear layer's output",
        ),
        ("MatMul", ("batch", "12", "sequence", "sequence"), "attention scores of each token with each other"),
        ("Transpose", ("batch", "12", "sequence", "32"), "rearranged activations"),
        ("Transpose", ("4", "384"), "a slice's values or a constant"),
        ("Mul", ("batch", "sequence", "384"), "values between two layers"),
    ],
)
def test_a_tensor_is_told_in_words(operator: str, shape: tuple[str, ...], words: str) -> None:
    """What a tensor is follows from its operator and its sides, and a side of draws makes it a tangent."""
    assert tensor_words(PeakTensor("permute_2", operator, shape, SizeTerm(4.0, 1, 1))) == words


def test_an_observer_times_its_looks_and_notes_when_phases_begin() -> None:
    """Every look counts, a phase begins with its first, and looking has a cost."""
    from edge_runtime.memory.meter import read_memory

    observer = Observer()
    memory = read_memory(observer.process_id)
    for second, phase in enumerate(("start", "load", "load")):
        observer.phase = phase
        observer.add(float(second), memory)
    assert observer.entered_s == {"start": 0.0, "load": 1.0}
    assert observer.looks == 3
    assert 0 < observer.look_s < 0.1
    assert all(a.seconds < b.seconds for a, b in pairwise(observer.samples))


def test_settings_of_the_child_survive_the_way() -> None:
    """What the comparison with backpropagation is asked decodes to what was encoded."""
    from edge_runtime.profile.comparisons import BackpropagationSettings

    settings = BackpropagationSettings("m", "p", "0" * 64, "d", ("a", "b"), 16, 8, 3, 0, 1)
    assert msgspec.json.decode(msgspec.json.encode(settings), type=BackpropagationSettings) == settings
