import json

from benchmarks.harness.result_file import EARLIER, earlier_rows, figure, write_result


def test_a_figure_is_the_median_with_its_range() -> None:
    """One disturbed repetition moves the range, not the value."""
    made = figure("Step", "seconds", [0.21, 0.2, 0.9])
    assert (made.value, made.low, made.high, made.reach, made.met) == (0.21, 0.2, 0.9, None, None)


def test_an_aim_is_met_up_to_and_at_its_value() -> None:
    """The comparison is with the value as measured, before it is rounded for showing."""
    assert figure("Ratio", "times", [2.4], reach=2.4).met is True
    missed = figure("Ratio", "times", [2.400001], reach=2.4)
    assert (missed.value, missed.met) == (2.4, False)


def test_bytes_stay_whole_numbers() -> None:
    """Sizes are stored to the byte."""
    assert figure("Peak", "bytes", [123_456_789, 123_456_787, 123_456_788]).value == 123_456_788


def test_a_result_names_everything_needed_to_repeat_it(tmp_path) -> None:
    """Command, commit, machine, versions, threads and conditions stand beside the rows."""
    path = tmp_path / "results" / "figures.json"
    rows = [figure("Ratio", "times", [2.0], reach=2.4)]
    document = write_result(path, "make bench", 2, rows, {"batch": "8 x 128 tokens"})
    assert json.loads(path.read_text()) == document
    assert set(document["machine"]) == {"cpu", "architecture", "cores", "memory_bytes", "kernel"}
    assert {"python", "onnxruntime"} <= set(document["versions"])
    assert document["rows"][0] == {
        "name": "Ratio",
        "value": 2.0,
        "unit": "times",
        "reach": 2.4,
        "met": True,
        "low": 2.0,
        "high": 2.0,
    }


def test_rows_of_other_subjects_stay_with_their_commit(tmp_path) -> None:
    """What is measured anew goes; the rest keeps its commit through later runs, and a missing file has none."""
    path = tmp_path / "figures.json"
    assert earlier_rows(path, []) == ([], {})
    rows = [figure("A: end", "%", [1.0]), figure("B: end", "%", [2.0])]
    first = write_result(path, "bench", 1, rows, {})["commit"]
    document = json.loads(path.read_text()) | {
        "commit": "later",
        "conditions": {EARLIER: {"A: end": "oldest"}},
    }
    path.write_text(json.dumps(document))
    kept, commits = earlier_rows(path, ["C"])
    assert first and (kept, commits) == (rows, {"A: end": "oldest", "B: end": "later"})
    assert earlier_rows(path, ["A: "]) == ([rows[1]], {"B: end": "later"})
