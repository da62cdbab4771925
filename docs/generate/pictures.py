"""Makes docs/dashboard/*.png: ``python -m docs.generate.pictures``, with Chromium.

The coordinator is the real one; its fleet is made up (:mod:`benchmarks.coordinator.dashboard_site`).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from urllib.parse import quote

from benchmarks.coordinator.dashboard import signed_in
from benchmarks.coordinator.dashboard_site import fill
from benchmarks.coordinator.serving import serving
from benchmarks.harness.browser import browser

PICTURES = Path(__file__).parents[1] / "dashboard"
WIDE, PHONE = (1180, 860), (390, 780)


def main() -> None:
    """Take the pictures."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        ids = fill(folder, devices=480, rounds=64, per_round=12, now_s=time.time())
        with serving(folder / "state") as (url, _), browser() as window:
            name, _, value = signed_in(url, (folder / "state/admin.token").read_text().strip()).partition("=")
            window.call("Network.setCookie", name=name, value=value, url=url)
            run = f"/runs/{quote(ids[-1])}"
            for picture, path, size, dark in (
                ("overview-light", "/", WIDE, False),
                ("overview-dark", "/", WIDE, True),
                ("run-light", run, WIDE, False),
                ("run-phone", run, PHONE, True),
                ("fleet-phone", "/fleet", PHONE, False),
                ("device-dark", "/devices/d-device-00007", WIDE, True),
                ("new-run-light", f"/runs/new?like={quote(ids[0])}", WIDE, False),
                ("compare-light", f"/compare?run={quote(ids[0])}&run={quote(ids[-1])}", WIDE, False),
            ):
                window.screen(*size, dark=dark, phone=size == PHONE)
                window.open(url + path)
                window.picture(PICTURES / f"{picture}.png")


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    main()
