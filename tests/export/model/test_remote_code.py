"""Folders that name Python code, of their own or of other repositories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from edge_runtime.errors import ModelError
from export.model.remote_code import check_code

#: As Alibaba-NLP/gte-multilingual-base has it (huggingface/text-embeddings-inference#375).
GTE = {
    "model_type": "new",
    "architectures": ["NewModel"],
    "auto_map": {
        "AutoConfig": "Alibaba-NLP/new-impl--configuration.NewConfig",
        "AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel",
    },
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the library that keeps code."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refuse(folder: Path, config: dict[str, Any], *, trusted: bool) -> str:
    with pytest.raises(ModelError) as caught:
        check_code(folder, config, trust_remote_code=trusted)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_another_repository_is_told_and_the_way_out_works(
    tmp_path: Path, cache: Path, trusted: bool
) -> None:
    """What is neither in the folder nor in the cache is named, trusted or not; once it is kept it may be trusted."""
    message = refuse(tmp_path, GTE, trusted=trusted)
    assert "asks to run Python code of another repository, Alibaba-NLP/new-impl (auto_map)" in message
    assert "use a model that transformers knows by itself (this architecture is gte there)" in message
    kept = cache / "models--Alibaba-NLP--new-impl"
    (kept / "snapshots/1").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs/main").write_text("1")
    for name in ("configuration.py", "modeling.py"):
        (kept / "snapshots/1" / name).write_text("")
    assert "--trust-remote-code" in refuse(tmp_path, GTE, trusted=False)
    assert check_code(tmp_path, GTE, trust_remote_code=True) == ()


def test_the_other_way_out_works(tmp_path: Path, cache: Path) -> None:
    """A folder of the architecture that transformers has for it is taken, without code or with code it does without."""
    assert check_code(tmp_path, {"model_type": "gte"}, trust_remote_code=False) == ()
    (note,) = check_code(tmp_path, {**GTE, "model_type": "gte"}, trust_remote_code=False)
    assert note == "The code that config.json names (auto_map) is not run: transformers knows gte by itself"


@pytest.mark.parametrize("kind", ["phi3", "nomic_bert", "qwen2"])  # huggingface/peft#1851
def test_code_that_transformers_does_without_is_named_as_not_run(tmp_path: Path, kind: str) -> None:
    """Folders from before an architecture was taken in still name its code, and transformers does not run it."""
    config = {"model_type": kind, "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    (note,) = check_code(tmp_path, config, trust_remote_code=False)
    assert f"transformers knows {kind} by itself" in note
    assert check_code(tmp_path, config, trust_remote_code=True) == ()


@pytest.mark.parametrize(
    "named", [{"AutoTokenizer": ["tokenization.Slow", None]}, {"AutoTokenizer": [None, "x/../y--z.Fast"]}]
)
def test_code_of_a_tokenizer_is_refused(tmp_path: Path, cache: Path, named: dict[str, Any]) -> None:
    """A tokenizer's code is refused whatever the model is, also where its reference is no name of a repository."""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": named}))
    assert "tokenizer_config.json asks to run Python code" in refuse(
        tmp_path, {"model_type": "bert"}, trusted=False
    )
