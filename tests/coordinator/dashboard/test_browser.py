"""The dashboard in a real browser, on a real coordinator: one story from signing in to signing out."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.harness.browser import Browser, browser
from coordinator.api.serve import CoordinatorServer, ServeOptions, bind
from tests.coordinator.conftest import World
from tests.edge_runtime.html.pages import needs_browser

PASSWORD = "a password that is long"


class WallClock:
    """The machine's own time."""

    @property
    def now_s(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def __call__(self) -> float:
        """The same."""
        return time.time()


class LiveWorld(World):
    """A coordinator on a socket, whose loops run."""

    server: CoordinatorServer
    thread: threading.Thread

    def start(self) -> None:
        """Serve on a free port."""
        self.clock = WallClock()  # type: ignore[assignment]
        self.server = bind(ServeOptions(self.folder / "state", port=0))
        self.app = self.server.server.config.app  # type: ignore[assignment]
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.server.started:
            time.sleep(0.01)
        self.client = httpx.Client(base_url=self.server.url, timeout=30)  # type: ignore[assignment]

    def stop(self) -> None:
        """End the server."""
        self.client.close()
        self.server.stop()
        self.thread.join()

    def round(self) -> None:
        """One round by the whole fleet, as it comes."""
        wanted = len(self.run()["rounds"])
        open_ones = [entry for entry in self.run()["rounds"] if entry["state"] in ("selecting", "collecting")]
        number = open_ones[-1]["round"] if open_ones else wanted
        until_s = time.monotonic() + 60
        while time.monotonic() < until_s:
            rounds = self.run()["rounds"]
            if len(rounds) > number and rounds[number]["state"] == "committed":
                return
            for device in self.devices.values():
                task = device.task()
                if task is not None:
                    device.deliver(device.result(task))
            time.sleep(0.05)
        raise AssertionError("no round was committed within a minute")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[LiveWorld]:
    """A coordinator with two devices and an operator who has a password."""
    world = LiveWorld(tmp_path)
    try:
        world.fleet("door-1", "door-2")
        user = {"name": "olga", "role": "operator", "password": PASSWORD}
        assert world.admin("POST", "/v1/admin/users", user).status_code == 201
        yield world
    finally:
        world.stop()


def look_for_barriers(window: Browser, seen: dict[str, list[str]]) -> None:
    """What axe-core finds serious or critical on the page that stands, in light and in dark, wide and narrow."""
    spec = importlib.util.find_spec("axe_playwright_python")
    assert spec is not None and spec.origin is not None, "install tests/axe.txt (make setup does)"
    script = (Path(spec.origin).parent / "axe.min.js").read_text("utf-8")
    for width, dark in ((1280, False), (390, True)):
        window.screen(width, 900, dark=dark)
        found = window.run(
            f"{script}; axe.run(document, {{resultTypes: ['violations']}}).then(r => JSON.stringify("
            "r.violations.filter(v => ['serious', 'critical'].includes(v.impact))"
            ".map(v => v.id + ': ' + v.nodes.map(n => n.target + ' ' + n.failureSummary).join(' | '))))"
        )
        overflow = window.run("document.documentElement.scrollWidth - innerWidth")
        title = window.run("document.title")
        if json.loads(found):
            seen[f"{title} at {width}"] = json.loads(found)
        if overflow > 0:
            seen[f"{title} at {width}: wider than the screen"] = [str(overflow)]
    window.screen(1280, 900)


@needs_browser
def test_an_operator_works_from_signing_in_to_signing_out(site: LiveWorld) -> None:  # noqa: PLR0915 - one story
    """Sign in, create a run, watch rounds arrive, open a device, abort, sign out; no page has a serious barrier."""
    barriers: dict[str, list[str]] = {}
    with browser() as window:
        window.screen(1280, 900)
        window.open(f"{site.server.url}/fleet")
        assert window.run("location.pathname") == "/sign-in"
        look_for_barriers(window, barriers)
        # Sign in with the keyboard alone, and come to the page that was asked for.
        window.type("#name", "olga")
        window.press("Tab")
        window.call("Input.insertText", text=PASSWORD)
        window.following(lambda: window.press("Enter"))
        assert window.run("location.pathname") == "/fleet"
        look_for_barriers(window, barriers)

        # A form with a mistake comes back as it was, with the error beside its field; then it is put right.
        window.open(f"{site.server.url}/runs/new")
        look_for_barriers(window, barriers)
        for key, value in {**site.config(rounds=30, evaluation=None), "min_results": 9}.items():
            field = f"document.querySelector('[name=\"run.{key}\"]').value = {json.dumps(str(value))}"
            if value is not None:
                window.run(field)
        submit = "document.querySelector('form[action=\"/runs/new\"] button.main').click()"
        window.following(lambda: window.run(submit))
        said = window.run("document.getElementById('f-min_results-error').textContent")
        assert "no round could ever commit" in said
        assert window.run("document.querySelector('[name=\"run.package\"]').value") == str(site.package)
        look_for_barriers(window, barriers)
        window.run("document.querySelector('[name=\"run.min_results\"]').value = '1'")
        window.following(lambda: window.run(submit))
        run_id = window.run("document.querySelector('h1').textContent")
        assert run_id == site.run()["run_id"]

        # Rounds arrive while the page stands: nothing loads it again.
        window.wait_for("document.getElementById('live-state').textContent === 'live'")
        window.run("window.stayed = true")
        for number in range(2):
            site.round()
            window.wait_for(
                f"[...document.querySelectorAll('#rounds tbody tr')].some(row => row.querySelector('th').textContent"
                f" === '{number}' && row.textContent.includes('committed'))"
            )
        window.wait_for("document.querySelectorAll('#curves polyline').length > 0")
        assert window.run("window.stayed")
        look_for_barriers(window, barriers)

        # A device, its report and its history.
        window.open(f"{site.server.url}/devices/door-1")
        assert "round 1" in window.run("document.getElementById('history').textContent")
        assert "predicted" in window.run("document.getElementById('report').textContent")
        look_for_barriers(window, barriers)

        # Abort the run, and sign out; the page is not to be had any more.
        window.open(f"{site.server.url}/runs/{run_id}")
        window.following(lambda: window.run("document.querySelector('button.danger').click()"))
        assert site.run()["state"] == "stopped"
        for path in ("/", "/runs", f"/compare?run={run_id}", "/packages", "/releases", "/users"):
            window.open(f"{site.server.url}{path}")
            look_for_barriers(window, barriers)
        window.following(lambda: window.run("document.querySelector('.me button').click()"))
        window.open(f"{site.server.url}/runs/{run_id}")
        assert window.run("location.pathname") == "/sign-in"
        # The page that olga has no right to is the one thing that the browser reports.
        assert [line for line in window.console if "403" not in line and "422" not in line] == []
    assert barriers == {}
    acts = site.admin("GET", "/v1/admin/audit").json()
    assert [act["act"] for act in acts if act["who"] == "olga"][::-1] == [
        *("sign in", "create a run", "create a run", "stop a run", "sign out")
    ]
