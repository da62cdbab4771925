"""`make demo-shakespeare CHECKPOINT=folder`: a small story teller learns from Shakespeare, by forward mode, over HTTP.

Convert, export, serve, enrol, train, report: :func:`main` is the whole story, top to bottom. Every part is the
product's own command, started as a user would start it; logs and results are left in the output folder.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from edge_runtime.figures import duration, size
from examples.fleet import empty_folder, run, show, train_on_fleet
from examples.tinyshakespeare.compare import perplexity_of_adapter
from examples.tinyshakespeare.prepare import HERE, prepare

#: Projections that get a slice: all of a block's.
TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
SEQUENCE_LIMIT = 64


def main() -> int:
    """Run the demo; returns a process exit code."""
    arguments = _arguments()
    output = empty_folder(arguments.output)
    started = time.monotonic()

    print(f"1. Data: ten speakers of Shakespeare's plays on {arguments.devices} devices", flush=True)
    split = prepare(output / "data", arguments.devices)

    print("\n2. From the checkpoint to a package\n", flush=True)
    model, package = output / "model", output / "package"
    folder: Path = arguments.checkpoint
    show("export.cli", "llama2c", folder / "stories260K.bin", folder / "tok512.bin", "--output", model)
    publisher_key = run("export.cli", "key", output / "publisher.key").strip()
    show(
        *(
            "export.cli",
            "package",
            model,
            "--task",
            "causal_lm",
            "--check-data",
            split.dev,
            "--output",
            package,
        ),
        *("--key", output / "publisher.key", "--targets", TARGETS, "--sequence-limit", SEQUENCE_LIMIT),
    )

    slices = train_on_fleet(
        HERE / "run.toml", output, package, publisher_key, split.devices, split.dev, arguments.rounds
    )

    print("\n5. Results", flush=True)
    adapter = output / "adapter"
    run(
        *("export.cli", "adapter", package, "--slices", slices, "--publisher-key", publisher_key),
        *("--base-model", model, "--output", adapter),
    )
    report = {
        **_figures(json.loads((output / "run" / "report.json").read_text())["run"]),
        "peft_perplexity": perplexity_of_adapter(model, adapter, split.dev, SEQUENCE_LIMIT),
        "adapter": str(adapter),
        "seconds": round(time.monotonic() - started, 1),
    }
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(_text(report, output))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="folder with stories260K.bin and tok512.bin"
    )
    parser.add_argument("--output", type=Path, default=Path("build/demo-shakespeare"))
    parser.add_argument("--devices", type=int, default=10)
    parser.add_argument("--rounds", type=int, help="instead of those in run.toml")
    return parser.parse_args()


def _figures(summary: dict[str, Any]) -> dict[str, Any]:
    """What the coordinator measured."""
    rounds = summary["rounds"]
    return {
        "perplexity_before": summary["initial_perplexity"],
        "perplexity_after": next(r["perplexity"] for r in reversed(rounds) if r["perplexity"] is not None),
        "rounds": summary["rounds_committed"],
        "bytes_up": sum(r["bytes_up"] for r in rounds),
        "bytes_down": sum(r["bytes_down"] for r in rounds),
        "predicted_peak_bytes": max(r["predicted_peak_bytes"] or 0 for r in rounds),
        "measured_peak_bytes": max(r["measured_peak_bytes"] or 0 for r in rounds),
    }


def _text(report: dict[str, Any], output: Path) -> str:
    lines = [
        ("dev perplexity of a token, before", f"{report['perplexity_before']:.1f}"),
        (f"after {report['rounds']} rounds", f"{report['perplexity_after']:.1f}"),
        ("the adapter on the float model, by peft", f"{report['peft_perplexity']:.1f}"),
        ("time, export included", duration(report["seconds"])),
        ("bytes up / down", f"{size(report['bytes_up'])} / {size(report['bytes_down'])}"),
        (
            "peak memory of a worker, predicted / measured",
            f"{size(report['predicted_peak_bytes'])} / {size(report['measured_peak_bytes'])}",
        ),
        ("page", str(output / "run" / "report.html")),
        ("adapter", report["adapter"]),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n" + "\n".join(f"   {name.ljust(width)}  {value}" for name, value in lines)


if __name__ == "__main__":
    raise SystemExit(main())
