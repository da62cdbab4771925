"""Run configurations: what is refused, and how it is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator.config import one_visit, read_run_config, run_config
from edge_runtime.config_file import MAX_CONFIG_BYTES
from edge_runtime.errors import ConfigError
from tests.coordinator.conftest import RUN

GOOD: dict[str, Any] = {**RUN, "package": "package", "publisher_key": "A" * 43 + "="}

BAD = {
    "unknown key": ({"speed": 1}, "speed"),
    "unknown key of an optimiser": ({"server_optimizer": {"head": {"beta3": 1}}}, "beta3"),
    "a head's rate that sets itself": (
        {"server_optimizer": {"head": {"rate": "auto"}}},
        "only the slices' rate",
    ),
    "a rate of other words": (
        {"server_optimizer": {"slices": {"rate": "fast"}}},
        "server_optimizer.slices.rate",
    ),
    **{
        f"rate auto beside {key}": (
            {"server_optimizer": {"slices": {"rate": "auto"}}, "split": "whole", key: value, **more},
            f'"auto" measures the loss along the last step, and {key} = "{value}"',
        )
        for key, value, more in (
            ("update", "backprop", {"draws": 1, "directions": "per_example"}),
            ("update", "best", {"directions": "dealt"}),
            ("loss", "phuber", {}),
            ("head", "perturbed", {}),
            ("directions", "filtered", {"candidates": 4}),
            ("split", "cyclic", {}),
            ("slices", "none", {}),
            ("robust_mean", "clipped", {}),
            ("lora_aggregation", "product_svd", {}),
        )
    },
    "unknown key of the local optimiser": ({"local_optimizer": {"rate": 1.0}}, "rate"),
    "unknown optimiser": (
        {"server_optimizer": {"slices": {"name": "lion"}}},
        r"server_optimizer.slices.name",
    ),
    "zero rounds": ({"rounds": 0}, r"rounds"),
    "negative rate": ({"server_optimizer": {"slices": {"rate": -1.0}}}, r"server_optimizer.slices.rate"),
    "beta of one": ({"server_optimizer": {"slices": {"beta1": 1.0}}}, r"beta1"),
    "zero deadline": ({"deadline_s": 0}, "deadline_s"),
    "text for a number": ({"steps": "3"}, "steps"),
    "more results than slots": ({"min_results": 3}, "min_results = 3 exceeds devices_per_round = 2"),
    "more results than devices": (
        {"min_devices": 1, "min_results": 2},
        "min_results = 2 exceeds min_devices = 1",
    ),
    "empty window": ({"poll_min_s": 9.0}, "poll_min_s = 9.0 exceeds poll_max_s = 0.6"),
    "a key that is gone": ({"micro_batch": 2}, "unknown key 'micro_batch'"),
    "nothing to train": ({"slices": "none", "train_head": False}, "nothing to train"),
    "a slice twice": ({"slices": ["a", "a"]}, "twice"),
    "a dealt head that is not trained": ({"head_split": True, "train_head": False}, "head_split = true"),
    "a dealt head without a deal": ({"head_split": True, "split": "whole"}, 'split = "whole"'),
    "a product and an optimiser with state": (
        {"lora_aggregation": "product_svd", "server_optimizer": {"slices": {"name": "yogi"}}},
        'product_svd.*slices = "yogi".*basis turns; use "sgd" at rate 1',
    ),
    "a product and half a step": (
        {"lora_aggregation": "product_svd", "server_optimizer": {"slices": {"rate": 0.5}}},
        '"sgd" at rate 0.5',
    ),
    "more than enough": ({"enough_results": 3}, "enough_results = 3 must lie between min_results = 1"),
    "a buffer that is too small": (
        {"buffer_size": 1, "min_devices": 2, "min_results": 2},
        "is below min_results = 2",
    ),
    "a buffer and a gate": (
        {"buffer_size": 2, "min_results": 2, "gate_variance": 0.1},
        "gate_variance compares two halves",
    ),
    "a buffer that closes early": ({"buffer_size": 2, "enough_results": 2}, "buffer_size does that"),
    "a buffer of products": (
        {"buffer_size": 2, "lora_aggregation": "product_svd"},
        "needs factors of one time",
    ),
    "a gate on one result": ({"gate_variance": 0.1}, "min_results = 1 gives one: set 2"),
    "a gate without slices": ({"gate_variance": 0.1, "min_results": 2, "slices": "none"}, "trains none"),
    "a mean of nothing": ({"average_from_round": 2}, "average_from_round = 2 is past the last of rounds = 2"),
    "a warm-up without a head": ({"head_warm_up_rounds": 2, "train_head": False}, "head_warm_up_rounds = 2"),
    "an unknown split": ({"split": "random"}, "split"),
    "draws of backpropagation": (
        {"update": "backprop", "draws": 2},
        "makes no draws, so draws = 2 must be 1",
    ),
    "a head that backpropagation perturbs": (
        {"update": "backprop", "head": "perturbed"},
        'head = "perturbed" must be "exact"',
    ),
    "scalars of backpropagation": (
        {"update": "backprop", "report": "scalars"},
        'report = "scalars" must be "weights"',
    ),
    "a limit of backpropagation": ({"update": "backprop", "jvp_limit": 1.0}, "leave out jvp_limit"),
    "zero order of each example": (
        {"update": "zero_order"},
        'directions = "one_slice" would need batches of one',
    ),
    "a best that is normalised on the device": (
        {"update": "best", "local_optimizer": {"name": "adamw"}},
        'normalises each by itself; take "accumulate" or "sgd"',
    ),
    "a best of products": (
        {"update": "best", "lora_aggregation": "product_svd"},
        'take "factors" or "frozen_a"',
    ),
    "candidates without a filter": ({"candidates": 10}, 'belongs to directions = "filtered"'),
    "an unknown update": ({"update": "sideways"}, "update"),
    "a local rate of zero": (
        {"local_optimizer": {"slice_rate": 0.0}},
        r"local_optimizer.slice_rate is .*> 0.0",
    ),
    "a local rate beyond": (
        {"local_optimizer": {"head_rate": 1e7}},
        r"local_optimizer.head_rate is .*<= 1000000.0",
    ),
    "no draws": ({"draws": 0}, r"draws is .*>= 1"),
    "a knot below one": ({"loss": "phuber", "tau": 1.0}, r"tau is .*> 1.0"),
    "a server's tau of zero": ({"server_optimizer": {"slices": {"tau": 0.0}}}, r"slices.tau is .*> 0.0"),
    "a server's tau beyond": ({"server_optimizer": {"head": {"tau": 1e4}}}, r"head.tau is .*<= 1000.0"),
    "a limit of zero on derivatives": ({"jvp_limit": 0.0}, r"jvp_limit is .*> 0.0"),
    "too many candidates": ({"candidates": 1001}, r"candidates is .*<= 1000"),
    "a gate of zero": ({"gate_variance": 0.0}, r"gate_variance is .*> 0.0"),
    "a mean from before the start": ({"average_from_round": -1}, r"average_from_round is .*>= 0"),
    "a negative warm-up": ({"head_warm_up_rounds": -1}, r"head_warm_up_rounds is .*>= 0"),
    "an unknown report": ({"report": "gradients"}, "report"),
    "an unknown mean of LoRA": ({"lora_aggregation": "stacked"}, "lora_aggregation"),
    "seed too large": ({"seed": 1 << 63}, "seed"),
}


@pytest.mark.parametrize(("changed", "named"), BAD.values(), ids=BAD.keys())
def test_refused(changed: dict[str, Any], named: str) -> None:
    """What cannot be used is refused with the key, and the limit where there is one."""
    with pytest.raises(ConfigError, match=named):
        run_config({**GOOD, **changed})


def test_missing_key() -> None:
    """A key that is needed and missing is named."""
    with pytest.raises(ConfigError, match="publisher_key"):
        run_config({name: value for name, value in GOOD.items() if name != "publisher_key"})


def test_toml(tmp_path: Path) -> None:
    """A file is read with its tables; its paths start at its own folder."""
    path = tmp_path / "run.toml"
    path.write_text(
        f"""
        name = "demo"
        package = "out/package"
        publisher_key = "{GOOD["publisher_key"]}"
        seed = 1
        rounds = 3
        devices_per_round = 2
        min_devices = 2
        steps = 4
        batch_size = 8
        slices = ["block0.query"]
        [local_optimizer]
        name = "accumulate"
        [server_optimizer.slices]
        name = "yogi"
        rate = 0.05
        [server_optimizer.head]
        name = "sgd"
        [evaluation]
        data = "dev.jsonl"
        every_rounds = 2
        """
    )
    config = read_run_config(path)
    assert config.package == str(tmp_path / "out/package")
    assert config.slices == ("block0.query",)
    assert config.server_optimizer.slices.name == "yogi"
    assert config.evaluation is not None
    assert config.evaluation.data == str(tmp_path / "dev.jsonl")


def test_file_errors_name_the_file(tmp_path: Path) -> None:
    """A missing file, one far too large, broken TOML and a bad key all name the file."""
    path = tmp_path / "run.toml"
    with pytest.raises(ConfigError, match=r"cannot read .*run\.toml"):
        read_run_config(path)
    path.write_bytes(b"#" * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(ConfigError, match=r"run\.toml has more than 1048576 bytes"):
        read_run_config(path)
    path.write_text("name = ")
    with pytest.raises(ConfigError, match=r"run\.toml is not TOML"):
        read_run_config(path)
    path.write_text("name = 'x'")
    with pytest.raises(ConfigError, match=r"run\.toml: .*seed"):
        read_run_config(path)


def test_any_run_becomes_one_visit() -> None:
    """A configuration of training, with whatever options, is accepted as a visit, evaluated after every round."""
    trained = run_config(
        {
            **GOOD,
            "update": "zero_order",
            "directions": "filtered",
            "candidates": 3,
            "draws": 4,
            "jvp_limit": 2.0,
            "split": "cyclic",
            "head_split": True,
            "head_warm_up_rounds": 1,
            "gate_variance": 1.0,
            "min_results": 2,
            "min_devices": 4,
            "patience": 2,
            "features": [1, 3],
            "evaluation": {"data": "dev.jsonl", "every_rounds": 4},
        }
    )
    visit = one_visit(trained)
    again = run_config(msgspec.to_builtins(visit))
    assert (again.head, again.slices, again.rounds, again.features) == ("closed_form", "none", 0, (1, 3))
    assert again.evaluation is not None
    assert again.evaluation.every_rounds == 1
    with pytest.raises(ConfigError, match="train_head = false"):
        one_visit(run_config({**GOOD, "train_head": False}))
