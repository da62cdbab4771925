"""A small model exported once for the whole run, the order of tests, and which of them are quick.

Torch is imported only by the tests that ask for it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import quick, shared_folders

TESTS = Path(__file__).parent
#: Files and folders whose tests take longest, in the order they begin, by what a run with --durations=0 says.
FIRST = (
    "end_to_end",
    "faults",
    "export/packaging/test_families.py",
    "export/packaging",
    "export/adapters",
    "export/lowering",
    "export/model",
    "export",
    "edge_runtime/worker",
    "edge_runtime/profile",
    "edge_runtime/training",
    "coordinator/rounds",
    "coordinator/simulation",
)
#: Tests that `make test-extended` runs and `make test` does not: further exports, lowerings of structures that others
#: have too, runs of further methods to equal bytes, faults whose like other tests make too, and a flood whose memory
#: hangs on how many connections are served at once.
EXTENDED = (
    "export/model/test_generation.py",
    "export/adapters/test_onnx_model.py::test_a_classifier_of_transformers_own_class_is_written_too",
    "faults/test_strangers.py::test_devices_get_little_memory",
    "export/lowering/test_executorch.py::test_both_engines_lower_one_recording_in_any_order",
    "faults/test_disturbances.py::test_runs_end_in_the_same_bits[both]",
    "faults/test_disturbances.py::test_runs_end_in_the_same_bits[device]",
    "faults/test_disturbances.py::test_runs_end_in_the_same_bits[lock]",
    "faults/test_disturbances.py::test_runs_end_in_the_same_bits[descriptors]",
    "faults/test_masked_fleet.py::test_masked_rounds_over_http_give_the_plain_sum[True]",
    "network/test_bad_lines.py",
    "faults/test_device_kills.py::test_a_clock_that_is_off_by_a_day[86400]",
    "faults/test_device_kills.py::test_a_full_disk_costs_its_tasks_alone",
    "faults/test_device_kills.py::test_a_read_only_state_folder_is_told",
    "end_to_end/test_adapter.py::test_peft_predicts_what_the_runtime_predicts[lora]",
    "end_to_end/test_scalar_reports.py::test_every_method_ends_in_the_same_bytes[",
)
#: Families of test_families.py that are built like others there.
EXTENDED_FAMILIES = ("qwen2-sliding", "qwen3", "mistral", "opt", "roberta")
#: A group that runs in one process: real fleets. They share the publisher's folder and one undisturbed run, and two
#: fleets at once would be too many processes for two cores: their deadlines are in seconds.
FLEETS = ("end_to_end", "faults", "network")


def pytest_configure(config: pytest.Config) -> None:
    # Recording a model makes millions of objects that stay: looking through them all the time takes an eighth of it.
    gc.set_threshold(50_000, 20, 100)
    # torch.func.jvp loads torch's own decompositions, which torch still scripts (torch 2.13).
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    # torch.export copies its own tree specs in a way its own pytree deprecates (torch 2.13).
    config.addinivalue_line("filterwarnings", r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning")
    quick.watch()
    if not hasattr(config, "workerinput"):  # the process that starts the others, or the only one
        if missing := [name for name in FIRST if not (TESTS / name).exists()]:
            raise pytest.UsageError(f"tests/conftest.py names {missing} in FIRST, which do not exist")
        shared_folders.remove_old_folders()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """``-m quick`` does not even import the files that load torch."""
    if config.getoption("markexpr") != "quick" or not collection_path.name.startswith("test_"):
        return None
    return True if collection_path.is_file() and not quick.file_is_quick(collection_path) else None


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is quick; the longest groups begin, so that both processes of ``make test`` end at about one time."""
    for item in items:
        if quick.is_quick(item):
            item.add_marker("quick")
        if _is_extended(item.nodeid):
            item.add_marker("extended")
    items.sort(key=lambda item: _turn(item.path))  # stable: the tests of a folder keep their order


def _is_extended(nodeid: str) -> bool:
    """Whether a test is one that only ``make test-extended`` runs."""
    if "packaging/test_families.py" in nodeid:
        return any(f"[{family}" in nodeid or f"-{family}]" in nodeid for family in EXTENDED_FAMILIES)
    return any(part in nodeid for part in EXTENDED)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A quick test that starts a process or loads torch fails."""
    with quick.watched(item):
        return (yield)


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist, or without -n, nobody asks
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """A group of tests runs in one process, so that what its module makes is made once."""
    from xdist.scheduler import LoadScopeScheduling

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(TESTS.parent / nodeid.partition("::")[0])

    return Grouped(config, log)


def _turn(path: Path) -> int:
    name = path.relative_to(TESTS).as_posix()
    return next((turn for turn, first in enumerate(FIRST) if f"{name}/".startswith(f"{first}/")), len(FIRST))


def _group(path: Path) -> str:
    """A file, or all files with fleets."""
    name = path.relative_to(TESTS)
    return (
        "fleets" if name.parts[0] in FLEETS and name.name != "test_memory_prediction.py" else name.as_posix()
    )


@pytest.fixture(scope="session", autouse=True)
def shared_folders_stay_as_they_were():
    """The last test of a process fails if one of them changed a folder that others read."""
    yield
    changed = shared_folders.changed_folders()
    assert not changed, f"a test changed what is shared, and must copy it first: {changed}"


@pytest.fixture(scope="session")
def tiny_model():
    """Folder of a random two-block BERT with its own tokenizer."""
    from tests.export import tiny

    return tiny.shared_model()


@pytest.fixture(scope="session")
def exported(tiny_model):
    """The model with LoRA-XS slices in int8 and adjoint programs, as package, as torch reference and with its key."""
    from tests.export import tiny

    return tiny.export_shared(tiny_model, with_adjoint=True)


@pytest.fixture(scope="session")
def exported_int4(tiny_model):
    """The model with LoRA-XS slices in int4."""
    from tests.export import tiny

    return tiny.export_shared(tiny_model, quantisation="int4")


@pytest.fixture(scope="session")
def exported_plain(tiny_model):
    """The model with LoRA slices in float32, without adjoint programs."""
    from tests.export import tiny

    return tiny.export_shared(tiny_model, kind="lora", rank=2, quantisation="none")


@pytest.fixture(scope="session")
def exported_sparse(tiny_model):
    """The model with sparse slices of random entries in float32, without adjoint programs."""
    from tests.export import tiny

    return tiny.export_shared(tiny_model, kind="sparse", density=0.05, mask="random", quantisation="none")


@pytest.fixture(scope="session")
def exported_rows(tiny_model):
    """The model with two rows of each adapted layer in int8 and adjoint programs."""
    from tests.export import tiny

    return tiny.export_shared(tiny_model, kind="rows", rank=2, with_adjoint=True)


@pytest.fixture(scope="session")
def prepared_in(exported, tmp_path_factory):
    """The int8 package prepared for this machine, by arithmetic."""
    from edge_runtime.engines.onnxruntime_engine import OnnxEngine
    from edge_runtime.execution.prepare import prepare

    folder = tmp_path_factory.mktemp("prepared")
    return {
        name: prepare(exported.package, folder / name, OnnxEngine(), name)
        for name in exported.package.manifest.arithmetics
    }


@pytest.fixture(scope="session")
def float_prepared(prepared_in):
    """The int8 package prepared so that its matrix products run in float32."""
    return prepared_in["float"]
