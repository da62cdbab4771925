"""The dashboard's pages of a large fleet: time and size of each, and whether the first one moves while it loads.

The state folder is filled beforehand (:mod:`benchmarks.coordinator.dashboard_site`); the coordinator is the real one. A
time is of a whole answer, with nothing kept from an earlier one; CPU time is the coordinator's own, whatever else the
machine does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psutil
import urllib3

from benchmarks.coordinator.dashboard_site import fill
from benchmarks.coordinator.serving import serving
from benchmarks.harness.browser import CHROMIUM, browser
from benchmarks.harness.result_file import Figure, figure

#: Moments in which what was counted before is not used again.
APART_S = 2.1
_SHIFT = """new Promise(done => { let sum = 0;
  new PerformanceObserver(list => { for (const entry of list.getEntries()) sum += entry.value; })
    .observe({type: "layout-shift", buffered: true});
  setTimeout(() => done(sum), 1500); })"""


@dataclass(frozen=True)
class Load:
    """What is shown.

    Attributes:
        devices: number of enrolled devices.
        rounds: number of rounds of the longest run.
        per_round: number of results of a round.
        repeats: number of times that each page is asked for.
    """

    devices: int = 10_000
    rounds: int = 500
    per_round: int = 20
    repeats: int = 7


def measure(folder: Path, load: Load) -> list[Figure]:
    """Fill a state folder, start a coordinator, and ask for its pages."""
    ids = fill(folder, devices=load.devices, rounds=load.rounds, per_round=load.per_round, now_s=time.time())
    with serving(folder / "state") as (url, process):
        cookie = signed_in(url, (folder / "state/admin.token").read_text().strip())
        pages = {
            "the first page": "/",
            "the longest run's page": f"/runs/{quote(ids[-1])}",
            "the fleet's page": "/fleet",
            "a device's page": "/devices/d-device-00007",
        }
        figures = []
        for name, path in pages.items():
            times, cpu, size = _ask(url + path, cookie, load.repeats, process)
            reach = (0.3, 200_000.0) if path == "/" else (None, None)
            figures.append(figure(f"time of {name}", "seconds", times, reach[0]))
            figures.append(figure(f"CPU time of {name}", "seconds", cpu, reach[0]))
            figures.append(figure(f"size of {name}", "bytes", [float(size)], reach[1]))
        if CHROMIUM is not None:
            figures.append(figure("layout shift of the first page", "×", [_shift(url, cookie)], 0.0))
    return figures


def signed_in(url: str, token: str) -> str:
    """The cookie of a session by token."""
    pool = urllib3.PoolManager(retries=False)
    form = pool.request("GET", f"{url}/sign-in")
    word = form.data.decode().partition('name="csrf" value="')[2].partition('"')[0]
    answer = pool.request(
        "POST",
        f"{url}/sign-in",
        fields={"csrf": word, "name": "", "secret": token, "next": "/"},
        encode_multipart=False,
        headers={"Cookie": f"edge_sign_in={word}"},
        redirect=False,
    )
    cookies = answer.headers.getlist("set-cookie")
    return next(each for each in cookies if each.startswith("edge_session=")).partition(";")[0]


def _ask(
    url: str, cookie: str, repeats: int, process: psutil.Process
) -> tuple[list[float], list[float], int]:
    """Seconds on the wall and of the coordinator's CPU that each answer took, and its size."""
    pool = urllib3.PoolManager(retries=False, headers={"Cookie": cookie})
    times, cpu, size = [], [], 0
    for _ in range(repeats):
        time.sleep(APART_S)
        before, begun_s = _cpu_s(process), time.perf_counter()
        answer = pool.request("GET", url, redirect=False)
        times.append(time.perf_counter() - begun_s)
        cpu.append(_cpu_s(process) - before)
        if answer.status != 200:
            raise RuntimeError(f"{url} answered {answer.status}")
        size = len(answer.data)
    return times, cpu, size


def _cpu_s(process: psutil.Process) -> float:
    found = process.cpu_times()
    return float(found.user + found.system)


def _shift(url: str, cookie: str) -> float:
    """How far the first page's content moves while it loads, by the browser's own measure."""
    name, _, value = cookie.partition("=")
    with browser() as window:
        window.screen(1280, 900)
        window.call("Network.setCookie", name=name, value=value, url=url)
        window.open(f"{url}/")
        return float(window.run(_SHIFT))
