"""`make bench-decoder`: a decoder's slices between factors of what enters its layers, by forward mode and exactly.

    python -m benchmarks.learning.decoder --seeds 0,1,2

Devices, rows and rounds are those of Shakespeare's speakers in :mod:`benchmarks.learning.run`, and so are rates, where
no other is named: they were chosen between factors of the weights alone. The measure is the loss taken off a model that
knows children's stories. Work that was stopped goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from benchmarks.harness.result_file import RESULTS, Figure, write_result
from benchmarks.learning.arms import ARMS, DECODER, DECODER_PACKAGES, BenchArm, rate_of
from benchmarks.learning.datasets import speakers
from benchmarks.learning.run import ROUNDS, ArmSweep, export_package, fill, stories
from benchmarks.learning.tables import SPEAKERS, ArmCurve, loss_share, read_curves

RESULT = "decoder.json"
FACTORS = "xs-inputs"
PACKAGES = {
    FACTORS: (*DECODER_PACKAGES["xs"], "--factors", "inputs"),
    "lora8": DECODER_PACKAGES["lora8"],
}
#: Arms with their rates.
ARMS_HERE: dict[str, tuple[BenchArm, float]] = {
    "decks": (replace(ARMS["decks"], package=FACTORS), 0.05),
    "backprop": (replace(ARMS["backprop"], package=FACTORS), rate_of(DECODER, "backprop")),
    "lora8": (ARMS["lora8"], rate_of(DECODER, "lora8")),
    "decks-slow": (replace(ARMS["decks"], package=FACTORS), rate_of(DECODER, "decks")),
}
#: Least shares to reach of the loss that another arm takes off, in percent.
REACHES = {"backprop": 95.0, "lora8": 80.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, and write the result file; returns a process exit code."""
    arguments = _arguments(argv)
    output = arguments.output
    _, dev = speakers(arguments.data, output / "data" / DECODER)
    model = stories(arguments.data, output)
    for name, options in PACKAGES.items():
        export_package(output, DECODER, name, model, dev, ["--task", "causal_lm", *options])
    arms = {name: ARMS_HERE[name] for name in arguments.arms.split(",")}
    seeds = tuple(int(seed) for seed in arguments.seeds.split(","))
    sweep = ArmSweep(output / "decoder", DECODER, 1.0, seeds, ROUNDS, arms)
    path = output / "decoder.toml"
    path.write_text(sweep.config())
    fill(path, sweep, arguments.processes)
    command = "python -m benchmarks.learning.decoder " + " ".join(argv or sys.argv[1:])
    rates = {name: rate for name, (_, rate) in ARMS_HERE.items()}
    write_result(RESULTS / RESULT, command, 1, rows(read_curves(sweep.folder)), {"rates": rates})
    return 0


def rows(curves: dict[str, ArmCurve]) -> list[Figure]:
    """Perplexity where each arm ended, and shares of the loss that other arms take off."""
    table = []
    for name, (arm, rate) in ARMS_HERE.items():
        if name in curves:
            ends = list(curves[name].perplexities().values())
            low, mean, high = (round(value, 2) for value in (min(ends), fmean(ends), max(ends)))
            seeds = f"{len(ends)} seed{'s' * (len(ends) > 1)}"
            words = f"{SPEAKERS}: perplexity, {arm.kind}, {_factors(arm)}rate {rate:g} ({seeds})"
            table.append(Figure(words, mean, "", None, None, low, high))
    for ours in ("decks", "decks-slow"):
        for full, reach in REACHES.items():
            if {ours, full} <= curves.keys():
                own, other = f"8 dealt draws, rate {ARMS_HERE[ours][1]:g}", ARMS_HERE[full][0].kind
                label = f"{SPEAKERS}: loss off by {own}, over {other}"
                table.append(loss_share(label, curves[ours], curves[full], reach))
    return table


def _factors(arm: BenchArm) -> str:
    return "factors by inputs, " if arm.package == FACTORS else ""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    root = Path(__file__).parents[2]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.decoder", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", type=Path, default=root.parent / "shared" / "data", metavar="DIR")
    parser.add_argument("--output", type=Path, default=root / "build" / "learning", metavar="DIR")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--arms", default=",".join(ARMS_HERE), help="only these")
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.arms.split(",")) - set(ARMS_HERE):
        parser.error(f"{min(unknown)!r} is none of {', '.join(ARMS_HERE)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
