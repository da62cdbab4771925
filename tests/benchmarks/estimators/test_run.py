import msgspec
import numpy as np
import pytest

from benchmarks.estimators.errors import draws_within, judge, passes, per_example_error
from benchmarks.estimators.exact_gradients import BATCH, SLOTS, STEPS, GradientSnapshot, load, save
from benchmarks.estimators.methods import SHIPPED, EstimatorMethod, exact
from benchmarks.estimators.run import judge_method
from benchmarks.estimators.unshipped import unshipped_methods
from benchmarks.harness.labelled_texts import read_sst2, read_trec
from edge_runtime.package.manifest import SliceSpec, TensorSpec

SLICES, SIDE = 12, 2
SIZE = SLICES * SIDE * SIDE
ROWS = SLOTS * STEPS * BATCH


@pytest.fixture(scope="module")
def snapshot() -> GradientSnapshot:
    """Made-up gradients: a common part, much scatter, and slices of very different size."""
    generator = np.random.default_rng(3)
    sizes = np.repeat(np.geomspace(0.1, 1.0, SLICES), SIDE * SIDE)

    def rows() -> np.ndarray:
        return ((0.3 + generator.standard_normal((ROWS, SIZE))) * sizes).astype(np.float32)

    specs = tuple(
        SliceSpec(
            f"s{i}", "lora_xs", (i,), f"layer.{i}.query", (TensorSpec("core", (1, SIDE, SIDE), "core"),)
        )
        for i in range(SLICES)
    )
    residuals = generator.standard_normal((2, ROWS, 3)).astype(np.float32)
    last = rows().mean(axis=0)
    return GradientSnapshot(5, 1.0, specs, rows(), rows(), residuals[0], residuals[1], last, 0.0)


@pytest.mark.parametrize("draws", [1, 4])
def test_directions_per_example_err_as_the_formula_says(snapshot, draws: int) -> None:
    """The measured error after a step is (d - 1)/(K·B)·E‖g_i‖²/‖ḡ‖², summed over the round's steps."""
    found = judge_method(snapshot, SHIPPED["per_example"], draws, "whole", 10)["step"].error
    batches = snapshot.gradients.astype(np.float64).reshape(-1, BATCH, SIZE)
    assert found == pytest.approx(per_example_error(batches, draws), rel=0.05)


def test_one_slice_at_a_time_shares_the_noise_out(snapshot) -> None:
    """Moving one slice at a time errs less, slice by slice, than moving all where slices differ in size."""
    one, every = (
        judge_method(snapshot, SHIPPED[name], 4, "whole", 3)["round"] for name in ("one_slice", "per_example")
    )
    assert one.slice_error < 0.7 * every.slice_error


def test_unbiased_candidates_tend_to_the_gradient(snapshot) -> None:
    """The mean over many repetitions of every candidate that is not marked biased nears the exact gradient."""
    for name, method in unshipped_methods(snapshot).items():
        if method.biased:
            continue

        def averaged(step, method=method):
            tasks = [msgspec.structs.replace(step.task, seed=seed) for seed in range(12)]
            return np.mean([method.estimate(_with(step, task)) for task in tasks], axis=0)

        single = judge_method(snapshot, method, 4, "whole", 1)["task"].error
        many = judge_method(snapshot, EstimatorMethod(averaged), 4, "whole", 1)["task"].error
        assert many == pytest.approx(single / 12, rel=0.35), name


def _with(step, task):
    return type(step)(**{**vars(step), "task": task})


def test_exact_gradients_err_only_where_slices_are_dealt_out(snapshot) -> None:
    """Where every device trains all, a round of exact gradients has no error; dealt out, it lacks rows."""
    whole = judge_method(snapshot, EstimatorMethod(exact), 1, "whole", 1)
    dealt = judge_method(snapshot, EstimatorMethod(exact), 1, "cyclic", 1)
    assert whole["round"].error == pytest.approx(0.0, abs=1e-12)
    assert whole["round"].cosine == pytest.approx(1.0)
    assert dealt["step"].error == pytest.approx(0.0, abs=1e-12)
    assert dealt["round"].error > 0.01


def test_errors_of_slices_are_relative_to_each_slice() -> None:
    """A slice of small gradients counts as much as one of large ones."""
    exact_rows = np.array([[[10.0, 0.1]]])
    estimates = np.array([[[10.0, 0.2]]])
    found = judge(estimates, exact_rows, np.ones((1, 2)), [0, 1])["round"]
    assert found.error == pytest.approx(0.01 / 100.01)
    assert found.slice_error == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("budget", "way", "draws"), [(2, "forward", 1), (5, "forward", 4), (17, "forward", 16), (2, "central", 1),
                                 (5, "central", 2), (17, "central", 8)]
)  # fmt: skip
def test_draws_take_no_more_passes_than_allowed(budget: int, way: str, draws: int) -> None:
    """Forward mode takes 1 + K passes, central differences 2K; one more draw would exceed the budget."""
    assert draws_within(budget, way) == draws
    assert passes(draws, way) <= budget < passes(draws + 1, way)


def test_a_point_is_read_as_it_was_written(tmp_path, snapshot) -> None:
    """Arrays, slices and numbers survive the file."""
    save(tmp_path / "point", snapshot)
    read = load(tmp_path / "point")
    assert read.specs == snapshot.specs
    assert (read.round_number, read.loss) == (5, 1.0)
    assert np.array_equal(read.gradients, snapshot.gradients)


def test_texts_and_labels_are_read(tmp_path) -> None:
    """TREC's coarse class stands before the colon, in Latin-1; SST-2 has a header and tabs."""
    (tmp_path / "trec").mkdir()
    (tmp_path / "sst2").mkdir()
    (tmp_path / "trec" / "TREC.train").write_bytes("HUM:ind Who is Pel\xe9 ?\n".encode("latin-1"))
    (tmp_path / "sst2" / "train.tsv").write_text('label\tsentence\n1\ta "fine film \n')
    trec, sst2 = read_trec(tmp_path), read_sst2(tmp_path)
    assert (trec.texts, trec.labels) == (("Who is Pelé ?",), ("HUM",))
    assert (sst2.texts, sst2.labels) == (('a "fine film',), ("1",))


def test_missing_data_is_one_line_that_names_the_option(tmp_path) -> None:
    """Without the file the bench ends with its path and what to name."""
    with pytest.raises(SystemExit, match=r"^error: cannot read .*TREC\.train: .*--data$"):
        read_trec(tmp_path)
