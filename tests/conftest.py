"""A small model exported once for the whole run; torch is imported only by the tests that ask for it."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # torch.func.jvp loads torch's own decompositions, which torch still scripts (torch 2.13).
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    # torch.export copies its own tree specs in a way its own pytree deprecates (torch 2.13).
    config.addinivalue_line("filterwarnings", r"ignore:`isinstance\(treespec, LeafSpec\)`:FutureWarning")


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
    from edge_runtime.engines.onnx import OnnxEngine
    from edge_runtime.preparation import prepare

    folder = tmp_path_factory.mktemp("prepared")
    return {
        name: prepare(exported.package, folder / name, OnnxEngine(), name)
        for name in exported.package.manifest.arithmetics
    }


@pytest.fixture(scope="session")
def float_prepared(prepared_in):
    """The int8 package prepared so that its matrix products run in float32."""
    return prepared_in["float"]
