"""`make bench-flower`: a round of many devices with results of 100 kB, beside the same with Flower's SuperLink.

Both servers run on one core and what plays the devices on another, one after the other in one run. Flower comes from
its own environment, with its settings as they are: state in memory, federated averaging in a server app of the
SuperLink. Its memory is that of all its processes, pages that they share counted once; ours is the most that the
process ever held.
"""

from __future__ import annotations

import math
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread

import psutil

from benchmarks.coordinator import full_rounds
from benchmarks.coordinator.site import LARGE, LOAD_CORE, SERVER_CORE
from benchmarks.harness.arguments import bench_parser, command_line
from benchmarks.harness.result_file import RESULTS, Figure, figure, write_result
from benchmarks.harness.tables import table
from edge_runtime.package.slices import shapes

RESULT = RESULTS / "coordinator-flower.json"
HERE = Path(__file__).parent
#: What is looked at, and how often: a second has five looks, each of which costs the server about a millisecond.
LOOK_S = 0.2
#: Throughput of ours over Flower's, and peak of ours over Flower's.
THROUGHPUT, PEAK = 3.0, 1 / 3


@dataclass
class ProcessTree:
    """CPU and memory of a process and all below it, looked at again and again.

    Attributes:
        root: the first process.
        cpu_s: time of each look and CPU seconds of all processes until then.
        peak_bytes: most memory at any look, shared pages counted once.
    """

    root: psutil.Process
    cpu_s: list[tuple[float, float]] = field(default_factory=list)
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self._each: dict[int, float] = {}
        self._ended = Event()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look until the block ends."""
        thread = Thread(target=self._watch)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def cpu_until(self, when_s: float) -> float:
        """CPU seconds at the last look until a time."""
        return max(cpu for at_s, cpu in self.cpu_s if at_s <= when_s)

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_S):
            memory = 0
            try:
                family = [self.root, *self.root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            for process in family:
                try:
                    times = process.cpu_times()
                    memory += _shared_once_bytes(process.pid)
                except (psutil.NoSuchProcess, OSError):  # it ended between the two lines
                    continue
                self._each[process.pid] = times.user + times.system
            self.cpu_s.append((time.time(), sum(self._each.values())))
            self.peak_bytes = max(self.peak_bytes, memory)


def main() -> int:
    """Measure both, and write the table."""
    parser = bench_parser(__doc__.splitlines()[0], RESULT, folder=None)
    parser.add_argument("--flower", type=Path, default=Path("build/flower"), help="Flower's environment")
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1, help="rounds of Flower; of ours there are two more")
    arguments = parser.parse_args()
    load = full_rounds.Load(devices=arguments.devices, rounds=arguments.rounds + 2)
    os.sched_setaffinity(0, {LOAD_CORE})
    with tempfile.TemporaryDirectory() as folder:
        ours = full_rounds.measure(Path(folder), load)
    with tempfile.TemporaryDirectory() as folder:
        theirs = _flower(Path(folder), arguments.flower.resolve(), replace(load, rounds=arguments.rounds))
    command = command_line("benchmarks.coordinator.against_flower", "bench-flower")
    conditions = {
        "devices": load.devices,
        "connections": load.connections,
        "rounds of Flower": arguments.rounds,
        "loads at the end": list(os.getloadavg()),
    }
    document = write_result(arguments.output, command, 1, _figures(ours, theirs, load.devices), conditions)
    print("\n" + table(document))
    return 0


def _figures(ours: full_rounds.Found, theirs: full_rounds.Found, devices: int) -> list[Figure]:
    """Ours beside theirs. The first round of ours is left out: its devices have all checked in before."""
    speed = [[devices / each for each in side] for side in (ours.round_s[1:], theirs.round_s)]
    cpu = [[each / devices for each in side] for side in (ours.round_cpu_s[1:], theirs.round_cpu_s)]
    faster = (sum(speed[0]) / len(speed[0])) / (sum(speed[1]) / len(speed[1]))
    cheaper = (sum(cpu[1]) / len(cpu[1])) / (sum(cpu[0]) / len(cpu[0]))
    return [
        figure("time of a round, relative to Flower's", "times", [1 / faster], 1 / THROUGHPUT),
        figure("peak memory of the server, relative", "times", [ours.peak_bytes / theirs.peak_bytes], PEAK),
        figure("results per second over Flower's", "times", [faster]),
        figure("results per CPU second of the server over Flower's", "times", [cheaper]),
        figure("results of 100 kB per second", "a second", speed[0]),
        figure("CPU time of a result", "seconds", cpu[0]),
        figure("peak memory of the coordinator", "bytes", [float(ours.peak_bytes)]),
        figure("Flower: results of 100 kB per second", "a second", speed[1]),
        figure("Flower: CPU time of a result", "seconds", cpu[1]),
        figure("Flower: peak memory of SuperLink and server app", "bytes", [float(theirs.peak_bytes)]),
    ]


def _flower(folder: Path, flower: Path, load: full_rounds.Load) -> full_rounds.Found:
    """Play the rounds with a SuperLink."""
    port, times = _free_port(), folder / "times"
    environment = {
        **os.environ,
        "PATH": f"{flower / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": "",
        "FLWR_HOME": str(folder),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    address = f"127.0.0.1:{port}"
    (folder / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
    )
    words = [
        "flower-superlink",
        "--insecure",
        "--port",
        str(port),
        "--disable-runtime-dependency-installation",
    ]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            words,
            env=environment,
            stdout=log,
            stderr=log,
            preexec_fn=lambda: os.sched_setaffinity(0, {SERVER_CORE}),  # noqa: PLW1509
        )
    tree = ProcessTree(psutil.Process(server.pid))
    try:
        with tree.watched():
            _wait_until_open(port)
            _play(environment, address, load, times)
            while len(told := times.read_text().split()) <= load.rounds:
                if server.poll() is not None:
                    raise RuntimeError((folder / "log").read_text()[-2000:])
                time.sleep(LOOK_S)
            time.sleep(2 * LOOK_S)
    finally:
        family = [tree.root, *tree.root.children(recursive=True)]
        for process in family:
            process.terminate()
        psutil.wait_procs(family, timeout=20)
    ends = [float(each) for each in told]
    cpu = [tree.cpu_until(each) for each in ends]
    return full_rounds.Found(
        round_s=[after - before for before, after in pairwise(ends)],
        round_cpu_s=[after - before for before, after in pairwise(cpu)],
        memory_bytes=[],
        peak_bytes=tree.peak_bytes,
    )


def _play(environment: dict[str, str], address: str, load: full_rounds.Load, times: Path) -> None:
    """Register the nodes, start the run, and wait until each node has played its rounds."""
    words = [HERE / "flower_nodes.py", address, load.devices, load.rounds, load.connections]
    said = times.with_name("nodes")
    with said.open("w") as output:
        nodes = subprocess.Popen(["python", *map(str, words)], env=environment, stdout=output)
    try:
        while said.read_text().strip() != "registered":
            if nodes.poll() is not None:
                raise RuntimeError("Flower's nodes were not registered")
            time.sleep(LOOK_S)
        numbers = sum(math.prod(shape) for shape in shapes(LARGE).values())
        settings = f"nodes={load.devices} rounds={load.rounds} numbers={numbers} times='{times}'"
        app = str(HERE / "flower_app")
        subprocess.run(["flwr", "run", app, "--run-config", settings], env=environment, check=True)
        if nodes.wait() != 0:
            raise RuntimeError("Flower's nodes ended early")
    finally:
        nodes.kill()


def _wait_until_open(port: int) -> None:
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(LOOK_S)
        else:
            return


def _free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return int(each.getsockname()[1])


def _shared_once_bytes(pid: int) -> int:
    """Memory of a process, a page that n processes share counted as 1/n."""
    told = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(told.partition("\nPss:")[2].split()[0]) * 1024


if __name__ == "__main__":
    raise SystemExit(main())
