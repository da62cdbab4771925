"""A small model exported once for the whole run; torch is imported only by the tests that ask for it."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
#: Folders whose tests take longest, in the order they begin; the first two share the publisher's folder.
FIRST = ("end_to_end", "faults", "export")


def pytest_configure(config: pytest.Config) -> None:
    # Recording a model makes millions of objects that stay: looking through them all the time takes an eighth of it.
    gc.set_threshold(50_000, 20, 100)
    # torch.func.jvp loads torch's own decompositions, which torch still scripts (torch 2.13).
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    # torch.export copies its own tree specs in a way its own pytree deprecates (torch 2.13).
    config.addinivalue_line("filterwarnings", r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest groups begin, so that both processes of ``make test`` end at about the same time."""
    items.sort(key=lambda item: _turn(item.path))  # stable: the tests of a folder keep their order


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist, or without -n, nobody asks
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """A group of tests runs in one process, so that what they share is made once."""
    from xdist.scheduler import LoadScopeScheduling

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(TESTS.parent / nodeid.partition("::")[0])

    return Grouped(config, log)


def _turn(path: Path) -> int:
    folder = path.relative_to(TESTS).parts[0]
    return FIRST.index(folder) if folder in FIRST else len(FIRST)


def _group(path: Path) -> str:
    """A file, or all files that use the publisher's folder."""
    shares_the_workshop = _turn(path) < 2 and path.name != "test_memory_prediction.py"
    return "workshop" if shares_the_workshop else str(path)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a random two-block BERT with its own tokenizer."""
    from tests.export import tiny

    return tiny.write_model(tmp_path_factory.mktemp("model") / "tiny-bert")


@pytest.fixture(scope="session")
def exported(tiny_model, tmp_path_factory):
    """The model with LoRA-XS slices in int8 and adjoint programs, as package, as torch reference and with its key."""
    from tests.export import tiny

    return tiny.export(tiny_model, tmp_path_factory.mktemp("package") / "int8", with_adjoint=True)


@pytest.fixture(scope="session")
def exported_int4(tiny_model, tmp_path_factory):
    """The model with LoRA-XS slices in int4."""
    from tests.export import tiny

    return tiny.export(tiny_model, tmp_path_factory.mktemp("package") / "int4", quantisation="int4")


@pytest.fixture(scope="session")
def exported_plain(tiny_model, tmp_path_factory):
    """The model with LoRA slices in float32, without adjoint programs."""
    from tests.export import tiny

    output = tmp_path_factory.mktemp("package") / "plain"
    return tiny.export(tiny_model, output, kind="lora", rank=2, quantisation="none")


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
