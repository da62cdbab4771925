"""What config.json alone tells: architectures that no package can be made of, each with its reason and a way out."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.errors import ModelError
from export.model.architecture import check_architecture

PATH = Path("model/config.json")
TEXT = {"vocab_size": 30522, "hidden_size": 64}
#: A configuration as published folders have it, and what the refusal says.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "t5": ({"model_type": "t5", "is_encoder_decoder": True, **TEXT}, "t5, an encoder with a decoder"),
    "whisper": (
        {"model_type": "whisper", "is_encoder_decoder": True, "num_mel_bins": 80},
        "encoder with a decoder",
    ),
    "mixtral": (
        {"model_type": "mixtral", "num_local_experts": 8, **TEXT},
        "mixture of experts (num_local_experts is 8)",
    ),
    "deepseek": ({"model_type": "deepseek_v3", "n_routed_experts": 256, **TEXT}, "(n_routed_experts is 256)"),
    "dbrx": (
        {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 16}, **TEXT},
        "(moe_num_experts is 16)",
    ),
    "hunyuan": ({"model_type": "hunyuan_v1_moe", "num_experts": [8, 16], **TEXT}, "(num_experts is 16)"),
    "mamba": ({"model_type": "mamba", "state_size": 16, **TEXT}, "mamba, a recurrent or state space model"),
    "rwkv": ({"model_type": "rwkv", **TEXT}, "rwkv, a recurrent or state space model"),
    "qwen3.5": (
        {"model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention"], **TEXT},
        "recurrent or state space model",
    ),
    "deberta-v2-xlarge": ({"model_type": "deberta-v2", "conv_kernel_size": 3, **TEXT}, "(conv_kernel_size)"),
    "clip": (
        {"model_type": "clip", "text_config": TEXT, "vision_config": {"patch_size": 32}},
        "(vision_config)",
    ),
    "vit": ({"model_type": "vit", "image_size": 224}, "vit, a model of images or sound (image_size)"),
    "resnet": ({"model_type": "resnet", "num_channels": 3}, "(num_channels)"),
    "wav2vec2": ({"model_type": "wav2vec2", "conv_dim": [512], "vocab_size": 32}, "(conv_dim)"),
    "none": (TEXT, "has no model_type"),
    "empty": ({"model_type": "", **TEXT}, "has no model_type"),
    "number": ({"model_type": 7, **TEXT}, "has no model_type"),
}
ACCEPTED: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", **TEXT},
    "experts not used": {"model_type": "doge", "num_experts": 16384, "is_moe": False, **TEXT},
    "no experts": {"model_type": "nomic_bert", "num_experts": 0, **TEXT},
    "a hybrid with attention alone": {
        "model_type": "granite",
        "mamba_d_state": 256,
        "layer_types": ["attention", "attention"],
        **TEXT,
    },
    "text with positions in an image": {"model_type": "layoutlmv3", "num_channels": 3, **TEXT},
    "an alias": {"model_type": "gpt-sw3", **TEXT},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_package_can_be_made_of_is_refused_by_name(name: str) -> None:
    """The message has the file, the architecture and the key that tells, in one line, and what to do instead."""
    config, expected = REFUSED[name]
    with pytest.raises(ModelError) as caught:
        check_architecture(PATH, config)
    message = str(caught.value)
    assert expected in message
    assert message.startswith(str(PATH))
    assert (
        "choose an encoder (BERT" in message or "save the model with transformers' save_pretrained" in message
    )
    assert "\n" not in message


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_only_looks_alike_is_let_through(name: str) -> None:
    """Keys of the same names that say nothing of the form refuse nothing."""
    check_architecture(PATH, ACCEPTED[name])


def test_an_architecture_that_transformers_does_not_know_names_both_versions() -> None:
    """The installed version, the one that saved the folder, and what to do are in the message."""
    config = {"model_type": "bert6", "transformers_version": "9.1.0", **TEXT}
    with pytest.raises(ModelError) as caught:
        check_architecture(PATH, config)
    message = str(caught.value)
    assert "has model_type 'bert6'" in message
    assert f"the installed transformers {metadata.version('transformers')} does not know" in message
    assert "(the folder was saved by 9.1.0); install a newer transformers" in message
    with pytest.raises(ModelError, match="does not know; install a newer"):
        check_architecture(PATH, {"model_type": "bert6", **TEXT})


def test_trusted_code_of_a_folder_may_bring_its_own_architecture() -> None:
    """With code of its own that may run, a folder may have any model_type or none; its form still counts."""
    own = {"auto_map": {"AutoConfig": "odd.OddConfig"}, **TEXT}
    check_architecture(PATH, {"model_type": "odd", **own}, trust_remote_code=True)
    check_architecture(PATH, own, trust_remote_code=True)
    with pytest.raises(ModelError, match="does not know"):
        check_architecture(PATH, {"model_type": "odd", **own})
    with pytest.raises(ModelError, match="mixture of experts"):
        check_architecture(PATH, {"num_experts": 8, **own}, trust_remote_code=True)


def test_torch_is_not_loaded_for_it() -> None:
    """Neither a refusal nor a known or unknown architecture needs torch, which takes seconds to import."""
    code = (
        "import json, sys; from pathlib import Path; from edge_runtime.errors import ModelError\n"
        "from export.model.architecture import check_architecture\n"
        "for config in json.loads(sys.argv[1]):\n"
        "    try: check_architecture(Path('config.json'), config)\n"
        "    except ModelError: print('refused')\n"
        "assert 'torch' not in sys.modules\n"
    )
    configs = [REFUSED["t5"][0], {"model_type": "bert6"}, ACCEPTED["bert"]]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(configs)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["refused", "refused"]
