"""All figures of what privacy costs.

python -m benchmarks.privacy.run [--stages masked,noise] [--no-file]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.harness.result_file import RESULTS, Figure, write_result
from benchmarks.privacy import masked, noise


def main() -> None:
    """Measure, print, and write a result file for each stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", default="masked,noise")
    parser.add_argument("--no-file", action="store_true", help="print only")
    arguments = parser.parse_args()
    for name in arguments.stages.split(","):
        with tempfile.TemporaryDirectory() as folder:
            figures: list[Figure] = (
                masked.measure(Path(folder), masked.Load())
                if name == "masked"
                else noise.measure(Path(folder))
            )
        print(name, json.dumps({row.name: row.value for row in figures}, indent=2), flush=True)
        if arguments.no_file:
            continue
        told = asdict(masked.Load()) if name == "masked" else noise.conditions()
        write_result(
            RESULTS / f"privacy-{name}.json",
            f"make bench-privacy STAGES={name}",
            1,
            figures,
            {**told, "loads at the end": list(os.getloadavg())},
        )


if __name__ == "__main__":
    main()
