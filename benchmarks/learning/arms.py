"""Arms of the learning bench: packages, methods and the grids from which their rates were chosen.

Every arm of a task meets the same devices, rows and batches. Every arm trains the head by the same exact gradient and
the same server optimiser, unless its published form says otherwise. Each gets the same effort: three rates, and one
more beyond the best if that was the first or last of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from coordinator.simulation.config import merged

#: Linear layers of MiniLM's last two blocks: where the slices are, so that what lies before can be cached.
LAST_BLOCKS = tuple(
    f"layer.{block}.{layer}"
    for block in (4, 5)
    for layer in (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )
)
#: Options of ``edge-export package``, by package.
PACKAGES: dict[str, tuple[str, ...]] = {
    "xs": ("--rank", "4", "--targets", ",".join(LAST_BLOCKS), "--with-adjoint"),
    "lora8": ("--slice", "lora", "--rank", "8", "--alpha", "8", "--with-adjoint"),
    "lora1": ("--slice", "lora", "--rank", "1", "--alpha", "1"),
}
#: Speakers of Shakespeare train a decoder of children's stories.
DECODER = "shakespeare"
#: Options of its packages. Its output layer is frozen: there is no head to train.
DECODER_PACKAGES = {
    "xs": ("--rank", "4", "--targets", "q_proj,v_proj,o_proj,up_proj,down_proj", "--with-adjoint"),
    "lora8": PACKAGES["lora8"],
    "lora1": PACKAGES["lora1"],
    "lora1-adjoint": (*PACKAGES["lora1"], "--with-adjoint"),
}
#: The server's rate for the head, in every arm that does not say otherwise. It is the best of the arm "head only",
#: except on TREC's two tasks: there it was set before the grid ran, and the best of "head only" is twice as much.
HEAD_RATES = {"trec": 0.01, "trec_fine": 0.02, "sst2": 0.01, "ag_news": 0.01, "banking77": 0.02}
#: The best rate of each grid, by accuracy after 16 rounds on a seed of its own (``--stage rates``). An arm that a task
#: does not name has its rate on TREC.
RATES: dict[str, dict[str, float]] = {
    "trec": {
        "head": 0.02,
        "backprop": 0.2,
        "ours": 0.2,
        "ours16": 0.2,
        "decks": 0.2,
        "decks16": 0.2,
        "every": 0.2,
        "every16": 0.2,
        "lora8": 0.005,
        "spry": 0.01,
        "mezo": 0.02,
        "baffle": 0.05,
        "fwdllm": 0.05,
        "fedavg": 0.1,
        "fedyogi": 0.03,
        "fedavgsplit": 0.03,
        "fedsgd": 0.3,
    },
    "trec_fine": {"head": 0.04},
    "sst2": {"head": 0.01, "backprop": 0.1, "ours": 0.1, "ours16": 0.1},
    "ag_news": {"head": 0.01, "backprop": 0.05, "ours": 0.05, "ours16": 0.05},
    "banking77": {"head": 0.02, "backprop": 0.1, "ours": 0.1, "ours16": 0.1},
    "shakespeare": {
        "backprop": 0.1,
        "ours": 0.02,
        "ours16": 0.02,
        "decks": 0.02,
        "decks16": 0.02,
        "every": 0.02,
        "every16": 0.02,
        "lora8": 0.02,
        "spry": 0.03,
        "mezo": 0.02,
        "fwdllm": 0.02,
        "backprop-lora1": 0.05,
        "ours-lora1": 0.02,
        "ours-lora1-1": 0.01,
    },
}
ADAM = {"name": "adam", "tau": 1e-4}
YOGI = {"name": "yogi", "rate": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}


@dataclass(frozen=True)
class BenchArm:
    """One arm.

    Attributes:
        kind: what tables call it.
        package: name of its package in :data:`PACKAGES`.
        run: settings of its run that differ from the common ones.
        rate: dotted keys in ``run`` that the grid sets, all to one value.
        grid: rates that the grid tries.
        rounds_times: its number of rounds, over that of the other arms.
    """

    kind: str
    package: str
    run: dict[str, Any]
    rate: tuple[str, ...]
    grid: tuple[float, ...]
    rounds_times: int = 1

    def with_rate(self, rate: float) -> dict[str, Any]:
        """The settings of its run at one rate."""
        table = self.run
        for path in self.rate:
            over: Any = rate
            for key in reversed(path.split(".")):
                over = {key: over}
            table = merged(table, over)
        return table


#: Spry's published settings. The clients' rate comes from its grid.
SPRY = {
    "directions": "gaussian",
    "head": "perturbed",
    "split": "cyclic",
    "rate_decay": "none",
    "local_optimizer": {"name": "adamw"},
    "server_optimizer": {"slices": YOGI, "head": YOGI},
}
#: Published forms of backpropagation: devices update their values after every local step, and send the result.
LOCAL_RATE = ("local_optimizer.slice_rate", "local_optimizer.head_rate")
MEAN = {"name": "sgd", "rate": 1.0}
FEDAVG = {
    "update": "backprop",
    "rate_decay": "none",
    "local_optimizer": {"name": "adamw"},
    "server_optimizer": {"slices": MEAN, "head": MEAN},
}
SLICES_RATE = ("server_optimizer.slices.rate",)
ZERO_ORDER = {"update": "zero_order", "server_optimizer": {"slices": ADAM}}


def _exact(kind: str, package: str, grid: tuple[float, ...]) -> BenchArm:
    """Exact gradients, averaged before the server's Adam."""
    return BenchArm(
        kind, package, {"update": "backprop", "server_optimizer": {"slices": ADAM}}, SLICES_RATE, grid
    )


def _forward(kind: str, directions: str, draws: int, grid: tuple[float, ...]) -> BenchArm:
    """Forward mode on our slices, averaged before the server's Adam too."""
    run = {"directions": directions, "draws": draws, "server_optimizer": {"slices": ADAM}}
    return BenchArm(f"forward mode, {kind}", "xs", run, SLICES_RATE, grid)


ARMS: dict[str, BenchArm] = {
    "head": BenchArm(
        "head only", "xs", {"slices": "none"}, ("server_optimizer.head.rate",), (0.005, 0.01, 0.02)
    ),
    "backprop": _exact("backpropagation, the same slices", "xs", (0.05, 0.1, 0.2)),
    "ours": _forward("one slice a draw, 8 draws", "one_slice", 8, (0.05, 0.1, 0.2)),
    "ours16": _forward("one slice a draw, 16 draws", "one_slice", 16, (0.1, 0.2, 0.4)),
    "decks": _forward("one slice a draw, dealt directions, 8 draws", "dealt", 8, (0.05, 0.1, 0.2)),
    "decks16": _forward("one slice a draw, dealt directions, 16 draws", "dealt", 16, (0.1, 0.2, 0.4)),
    "every": _forward("every slice a draw, 8 draws", "per_example", 8, (0.1, 0.2, 0.4)),
    "every16": _forward("every slice a draw, 16 draws", "per_example", 16, (0.1, 0.2, 0.4)),
    "lora8": _exact(
        "backpropagation, LoRA r=8 on query and value of all blocks", "lora8", (0.002, 0.005, 0.01)
    ),
    "spry": BenchArm("Spry as published, LoRA r=1", "lora1", SPRY, LOCAL_RATE, (1e-4, 1e-3, 1e-2)),
    "spry8": BenchArm("Spry as published, 8 times the rounds", "lora1", SPRY, LOCAL_RATE, (), rounds_times=8),
    "fedavg": BenchArm("FedAvg, the same slices", "xs", FEDAVG, LOCAL_RATE, (1e-2, 3e-2, 1e-1)),
    "fedyogi": BenchArm(
        "FedYogi, the same slices",
        "xs",
        merged(FEDAVG, {"server_optimizer": {"slices": YOGI, "head": YOGI}}),
        LOCAL_RATE,
        (1e-2, 3e-2, 1e-1),
    ),
    "fedavgsplit": BenchArm(
        "FedAvgSplit, the same slices dealt to devices",
        "xs",
        merged(FEDAVG, {"split": "cyclic", "server_optimizer": {"slices": YOGI, "head": YOGI}}),
        LOCAL_RATE,
        (1e-2, 3e-2, 1e-1),
    ),
    "fedsgd": BenchArm(
        "FedSGD, the same slices",
        "xs",
        {
            "update": "backprop",
            "rate_decay": "none",
            "server_optimizer": {"slices": {"name": "sgd"}, "head": {"name": "sgd"}},
        },
        ("server_optimizer.slices.rate", "server_optimizer.head.rate"),
        (0.03, 0.1, 0.3),
    ),
    "mezo": BenchArm(
        "MeZO on our slices, exact head",
        "xs",
        {**ZERO_ORDER, "directions": "gaussian", "draws": 1, "difference_step": 1e-3},
        SLICES_RATE,
        (0.02, 0.05, 0.1),
    ),
    "baffle": BenchArm(
        "BAFFLE on our slices, exact head",
        "xs",
        {
            **ZERO_ORDER,
            "directions": "gaussian",
            "draws": 20,
            "difference": "forward",
            "difference_step": 1e-4,
        },
        SLICES_RATE,
        (0.02, 0.05, 0.1),
    ),
    "fwdllm": BenchArm(
        "FwdLLM's filter on our slices, exact head",
        "xs",
        {**ZERO_ORDER, "directions": "filtered", "candidates": 10, "draws": 4, "difference_step": 1e-2},
        SLICES_RATE,
        (0.02, 0.05, 0.1),
    ),
}


def _on_lora1(kind: str, draws: int) -> BenchArm:
    """Forward mode on the slices that Spry is published with."""
    arm = _forward(kind, "one_slice", draws, (0.01, 0.02, 0.05))
    return replace(arm, kind=f"forward mode on LoRA r=1, {kind}", package="lora1-adjoint")


#: Arms that only the decoder has. Its matrices are so small that it can train the slices that Spry is published with.
DECODER_ARMS: dict[str, BenchArm] = {
    "backprop-lora1": _exact("backpropagation, LoRA r=1", "lora1-adjoint", (0.01, 0.02, 0.05)),
    "ours-lora1": _on_lora1("one slice a draw, 8 draws", draws=8),
    "ours-lora1-1": _on_lora1("one slice a draw, 1 draw", draws=1),
}


def arms_of(task: str) -> dict[str, BenchArm]:
    """The arms that a task can have: a decoder has no head to train alone."""
    if task != DECODER:
        return ARMS
    return {**{name: arm for name, arm in ARMS.items() if name != "head"}, **DECODER_ARMS}


def rate_of(task: str, arm: str) -> float:
    """The rate that a grid chose for an arm; Spry's longer runs have Spry's rate."""
    name = {"spry8": "spry"}.get(arm, arm)
    return {**RATES["trec"], **RATES.get(task, {})}[name]


def _changed(kind: str, **changes: Any) -> BenchArm:
    """Ours on TREC with some settings changed."""
    ours = ARMS["ours"]
    return BenchArm(kind, ours.package, merged(ours.with_rate(rate_of("trec", "ours")), changes), (), ())


#: The reasons for the defaults: our arm with one setting changed at a time, at our rate unless another is named.
CHOICES: dict[str, BenchArm] = {
    "all-slices-a-draw": _changed("every draw moves all slices", directions="per_example"),
    "dealt": _changed("slices dealt to devices", split="cyclic"),
    "dealt-orthogonal": _changed(
        "slices dealt, orthogonal directions shared by the batch", split="cyclic", directions="orthogonal"
    ),
    "gaussian": _changed("normal directions shared by the batch", directions="gaussian"),
    "4-draws": _changed("4 draws", draws=4),
    "local-adamw": _changed(
        "normalised on the device: AdamW, then the mean",
        local_optimizer={"name": "adamw", "slice_rate": 0.03, "head_rate": 0.03},
        server_optimizer={"slices": {"name": "sgd", "rate": 1.0}, "head": {"name": "sgd", "rate": 1.0}},
    ),
    "local-sgd": _changed("moves after every local step", local_optimizer={"name": "sgd"}),
    "momentum": _changed(
        "server momentum in place of Adam", server_optimizer={"slices": {"name": "momentum", "rate": 10.0}}
    ),
    "yogi": _changed("server Yogi in place of Adam", server_optimizer={"slices": {"name": "yogi"}}),
    "constant-rates": _changed("rates that do not fall", rate_decay="none"),
    "averaged": _changed(
        "rates that do not fall, the last rounds' values averaged", rate_decay="none", average_from_round=8
    ),
    "filtered": _changed(
        "directions near the last change (FwdLLM's filter), a quarter of the rate",
        directions="filtered",
        candidates=10,
        server_optimizer={"slices": {"rate": 0.05}},
    ),
    "head-first": _changed("4 rounds of the head alone", head_warm_up_rounds=4),
    "clamped": _changed("jvps clamped to 3", jvp_limit=3.0),
}
#: Our arm with each way to report, to count bytes; the values are the same to the last bit.
REPORTS: dict[str, BenchArm] = {
    "weights": _changed("ours, weights", report="weights"),
    "scalars": _changed("ours, scalars", report="scalars"),
    "weights-frozen-head": _changed(
        "ours, weights, the head trained no more", report="weights", train_head=False
    ),
    "scalars-frozen-head": _changed(
        "ours, scalars, the head trained no more", report="scalars", train_head=False
    ),
}
