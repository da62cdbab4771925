"""The Debian package for arm64 on an emulated processor: its tests, its figures beside this machine's, and a round.

``make test-arm64`` runs this where the kernel can be told of the emulator (binfmt_misc). An emulator computes what a
processor would, and says nothing of how long one takes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from devices.packaging.pins import CONSTRAINTS
from devices.packaging.wheels import Target, download, unpack
from edge_runtime.package.package import Package
from edge_runtime.protocol.signing import PrivateKey
from tests.end_to_end import harness
from tests.end_to_end.harness import Fleet, to_toml
from tests.end_to_end.workshop import Exported
from tests.installed import figures
from tests.installed.roots import ROOT, debian, overlay, why_no_arm64, why_no_mounts

REASON = why_no_mounts() or why_no_arm64()
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.slow]
PACKAGES = ("python3", "ca-certificates", "adduser")
PYTHON = "/opt/edge-runtime/bin/python3"
#: Processors and what a board's kernel tells of them: a Pi 5's. Emulated programs see this machine's /proc and /sys
#: otherwise, from which the engine learns what it may use. A Pi 4's (cortex-a72, 0xd08) is not among them: told of it,
#: the engine ends with an illegal instruction in the emulator, and no board was there to tell whose fault that is.
PROCESSORS = {
    "cortex-a76": (
        "0xd0b",
        "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
    ),
}
CPU_COUNT = 2
#: Tests of tangents, gradient, slices, package and executor whose outcome a processor, its engine or its compiler could
#: change. Left out, for an emulator takes minutes for them: those that repeat the same arithmetic for statistics, those
#: of names, messages and pages, those that ask torch, and replay's, which is compared between the machines below.
TESTED = {
    "training/test_tangents.py": (
        "test_bits_never_change",
        "test_recorded_bits_come_from_an_independent_generator",
        "test_recorded_decks_come_from_an_independent_dealer",
        "test_recorded_normals_come_from_an_independent_transform",
        "test_words_of_many_addresses_are_those_of_numpys_generator",
        "test_bits_are_read_from_the_lowest",
        "test_the_extreme_words_give_finite_normals",
        "test_the_largest_slot_and_step_are_dealt_too",
    ),
    "training/test_gradient.py": (
        "test_an_estimate_is_the_mean_of_jvp_times_direction",
        "test_tensors_are_estimated_side_by_side_as_they_are_alone",
        "test_dealt_directions_are_exact_where_examples_agree",
        "test_a_full_set_of_orthogonal_directions_gives_the_exact_gradient",
    ),
    "package/test_slices.py": (),
    "package/test_manifest.py": (),
    "execution/test_executor.py": (
        "test_packed_weights_change_no_bit",
        "test_micro_batches_give_what_one_batch_gives",
        "test_int8_arithmetic_rounds_each_row_by_itself",
        "test_slices_that_are_not_assigned_do_not_move",
        "test_without_moving_slices_there_are_no_jvps",
        "test_primal_and_dual_programs_agree_on_the_primal",
        "test_streamed_weights_give_the_same_bits",
        "test_values_move_the_results",
    ),
}
#: What those tests need beside what a device installs, pinned as for this machine.
LIBRARIES = ("hypothesis", "iniconfig", "packaging", "pluggy", "pygments", "pytest", "sortedcontainers")
JVP_TOLERANCE = 1e-4
#: How long an emulated round may take.
EMULATED_PATIENCE_S = 1200.0


@pytest.fixture(scope="module")
def deb() -> Path:
    (found,) = (ROOT / "build/deb").glob("edge-runtime_*+py3.11_arm64.deb")
    return found


@pytest.fixture(scope="module")
def root(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Debian for arm64 with the package installed, and with the tests in /srv."""
    with overlay(debian("arm64", PACKAGES), tmp_path_factory.mktemp("arm64") / "layers") as root:
        subprocess.run(["mount", "-t", "proc", "proc", root / "proc"], check=True)
        _pretend(root, "cortex-a76")
        subprocess.run(["mount", "--bind", root / "srv/cpuinfo", root / "proc/cpuinfo"], check=True)
        shutil.copy(deb, root / "root/edge-runtime.deb")
        done = run(root, "dpkg", "--install", "/root/edge-runtime.deb")
        assert done.returncode == 0, done.stdout + done.stderr
        for wheel in _libraries(root / "srv/wheels"):
            unpack(wheel, root / "srv/site")
        for name in ("tests", "docs"):
            shutil.copytree(
                ROOT / name, root / "srv/checkout" / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        shutil.copy(ROOT / "pyproject.toml", root / "srv/checkout")
        yield root


def _pretend(root: Path, processor: str) -> None:
    """Tell programs in the root what the kernel of a board with that processor tells."""
    part, features = PROCESSORS[processor]
    told = {
        "Features": features,
        "CPU implementer": "0x41",
        "CPU architecture": "8",
        "CPU variant": "0x0",
        "CPU part": part,
        "CPU revision": "1",
    }
    each = "".join(f"{name}\t: {value}\n" for name, value in told.items())
    text = "\n".join(f"processor\t: {number}\n{each}" for number in range(CPU_COUNT))
    (root / "srv/cpuinfo").write_text(text)  # in place: it is mounted
    folder = root / "sys/devices/system/cpu"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("possible", "present", "online"):
        (folder / name).write_text(f"0-{CPU_COUNT - 1}\n")


def _libraries(folder: Path) -> list[Path]:
    """Wheels of LIBRARIES for the device, of the versions and hashes of constraints.txt."""
    blocks = re.findall(r"^[\w.-]+==[^\n]*(?:\n    --hash=[^\n]*)*\n", CONSTRAINTS.read_text(), re.MULTILINE)
    chosen = [block for block in blocks if block.partition("==")[0] in LIBRARIES]
    assert len(chosen) == len(LIBRARIES)
    folder.mkdir()
    (folder / "pins.txt").write_text("".join(chosen))
    download(Target("arm64", "3.11"), folder / "pins.txt", folder)
    return sorted(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def recorded(root: Path, exported) -> Path:
    """The package and values away from zero, in the root as well; returns this machine's folder."""
    from tests.export import tiny

    folder = root / "srv/recorded"
    shutil.copytree(exported.package.folder, folder / "package")
    exported.key.save(folder / "publisher.key")
    save_file(tiny.flat(tiny.moved_slices(exported.reference)), folder / "values.safetensors")
    return folder


def run(
    root: Path, *words: object, processor: str = "max", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in the emulated system."""
    return subprocess.run(
        ["chroot", root, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        env={
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "QEMU_CPU": processor,
            "LC_ALL": "C.UTF-8",
            **environment,
        },
    )


def test_the_system_is_what_it_says(root: Path) -> None:
    """Programs in there are for arm64, and run by the emulator."""
    assert run(root, "uname", "-m").stdout.strip() == "aarch64"
    machine = run(
        root, PYTHON, "-c", "import platform, onnxruntime; print(platform.machine(), onnxruntime.__version__)"
    )
    assert machine.stdout.startswith("aarch64 "), machine.stderr


def test_the_installed_package_is_small(root: Path) -> None:
    """Unpacked it takes at most 150 MB, Python and the bytecode that its installation makes not counted."""
    paths = [
        path for path in (root / "opt/edge-runtime").rglob("*") if path.is_file() and not path.is_symlink()
    ]
    bytecode = sum(path.stat().st_size for path in paths if path.suffix == ".pyc")
    unpacked = sum(path.stat().st_size for path in paths) - bytecode
    parts: dict[str, int] = {}
    for path in paths:
        if path.suffix != ".pyc":
            part = path.relative_to(root / "opt/edge-runtime").parts
            name = part[3] if len(part) > 4 else "others"
            parts[name] = parts.get(name, 0) + path.stat().st_size
    largest = sorted(parts.items(), key=lambda each: -each[1])[:8]
    print(f"\nunpacked {unpacked / 1e6:.1f} MB, bytecode {bytecode / 1e6:.1f} MB:")
    print(", ".join(f"{name} {size / 1e6:.1f}" for name, size in largest))
    assert unpacked <= 150e6


def test_tests_pass_on_an_arm_processor(root: Path, recorded: Path) -> None:
    """The tests of tangents, gradient, slices, package and executor pass that a processor could make fail."""
    chosen = [
        f"{file}::{name}" if name else file for file, names in TESTED.items() for name in names or ("",)
    ]
    paths = " ".join(f"tests/edge_runtime/{each}" for each in chosen)
    plugins = "-p tests.installed.on_device -p no:cacheprovider"
    done = run(
        root,
        *("sh", "-c", f"cd /srv/checkout && {PYTHON} -m pytest {plugins} {paths}"),
        PYTHONPATH="/srv/site:/srv/checkout",
        EDGE_RECORDED="/srv/recorded",
        PYTHONDONTWRITEBYTECODE="1",
    )
    print(f"\n{done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-500:]}")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def here(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """What this machine computes."""
    package = _package(recorded)
    values = load_file(recorded / "values.safetensors")
    return figures.figures(package, values, tmp_path_factory.mktemp("here"))


def _package(recorded: Path) -> Package:
    return Package.open(recorded / "package", PrivateKey.load(recorded / "publisher.key").public_key)


@pytest.fixture(scope="module")
def there(root: Path, recorded: Path) -> Callable[[str], dict[str, np.ndarray]]:
    """What an emulated processor computes, by its name; each is asked once."""
    key = PrivateKey.load(recorded / "publisher.key").public_key
    known: dict[str, dict[str, np.ndarray]] = {}

    def ask(processor: str) -> dict[str, np.ndarray]:
        if processor not in known:
            output = f"/srv/recorded/{processor}.safetensors"
            done = run(
                root,
                *(PYTHON, "-m", "tests.installed.figures", "/srv/recorded/package", key),
                *("/srv/recorded/values.safetensors", output),
                processor=processor,
                PYTHONPATH="/srv/checkout",
            )
            assert done.returncode == 0, done.stderr[-3000:]
            known[processor] = load_file(root / output.lstrip("/"))
        return known[processor]

    return ask


@pytest.mark.parametrize("processor", PROCESSORS)
def test_tangents_are_the_same_bits(here, there, processor: str) -> None:
    """Directions of every kind that a task draws on arm64 are those that it draws on x86-64, bit for bit."""
    names = [name for name in here if name.startswith("tangents/")]
    assert len(names) >= 4 * len(figures.KINDS)
    for name in names:
        assert here[name].tobytes() == there(processor)[name].tobytes(), name


@pytest.mark.parametrize("processor", PROCESSORS)
def test_jvps_agree(here, there, recorded: Path, processor: str) -> None:
    """In float, directional derivatives differ by at most 1e-4 of the largest; in int8, by no more than rounding does.

    Where activations are rounded, two machines whose floats differ in the last bit round some of them to different
    levels, so that they differ by about what either differs from float arithmetic.
    """
    far = {}
    for arithmetic in _package(recorded).manifest.arithmetics:
        for kind in ("jvps", "loss"):
            ours, theirs = here[f"{arithmetic}/{kind}"], there(processor)[f"{arithmetic}/{kind}"]
            assert np.abs(ours).max() > 0.01
            far[f"{arithmetic} {kind}"] = difference = _relative(ours, theirs)
            rounding = _relative(here[f"float/{kind}"], ours)
            assert difference <= (JVP_TOLERANCE if arithmetic == "float" else 2 * rounding), (arithmetic, far)
    limits = [int(each["row_int8/limit"][0]) for each in (here, there(processor))]
    print(
        f"\n{processor}: "
        + ", ".join(f"{name} {value:.1e}" for name, value in far.items())
        + f"; levels {limits}"
    )


def _relative(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference over the largest magnitude."""
    return float(np.abs(one - other).max() / np.abs(one).max())


@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_report_is_replayed_to_the_same_bits(here, there, recorded: Path, processor: str) -> None:
    """What arm64 reports as scalars makes on x86-64 the very change that arm64 trained."""
    package, values = _package(recorded), load_file(recorded / "values.safetensors")
    found = there(processor)
    for arithmetic in package.manifest.arithmetics:
        change = figures.replayed(package, values, found, arithmetic)
        assert len(change) >= 4
        for name, array in change.items():
            assert array.tobytes() == found[f"{arithmetic}/change/{name}"].tobytes(), (arithmetic, name)
            assert array.tobytes() == found[f"{arithmetic}/replay/{name}"].tobytes(), (arithmetic, name)


def test_each_machine_takes_the_sign_that_it_likes(here, there) -> None:
    """Programs with signed activations run on arm64, those with unsigned ones here."""
    assert there("cortex-a76")["row_int8/signed"].tolist() == [True]
    assert here["row_int8/signed"].tolist() == [False]


@pytest.mark.parametrize("processor", PROCESSORS)
def test_int8_kernels_are_exact_at_the_extremes(there, processor: str) -> None:
    """No arm64 kernel saturates, so weights keep all their levels."""
    assert there(processor)["row_int8/limit"].tolist() == [127]


def test_two_emulated_devices_take_a_round(
    root: Path, recorded: Path, exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator on x86-64 commits a round of two arm64 devices, which then predict with what they have learned."""
    from tests.export import tiny

    monkeypatch.setattr(harness, "PATIENCE_S", EMULATED_PATIENCE_S)
    package, agents = Exported(exported.package.folder, exported.key.public_key), []
    with Fleet(tmp_path / "fleet", package) as fleet:
        fleet.create_run(
            rounds=1,
            devices_per_round=2,
            min_devices=2,
            min_results=2,
            steps=2,
            batch_size=4,
            report="scalars",
            deadline_s=EMULATED_PATIENCE_S,
            selection_timeout_s=EMULATED_PATIENCE_S,
        )
        for name, texts in (("ash", tiny.SENTENCES[:4]), ("birch", tiny.SENTENCES[4:])):
            folder = root / "srv" / name
            folder.mkdir()
            rows = [{"text": text, "label": tiny.LABELS[row % 3]} for row, text in enumerate(texts)]
            (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            settings = {
                "coordinator_url": fleet.url,
                "publisher_key": package.publisher_key,
                "enrolment_token": fleet.admin.create_token(),
                "device_name": name,
                "device_class": "generic",
                "data": "rows.jsonl",
                "state_folder": "state",
                "cap": "1G",
                "arithmetic": "row_int8",
            }
            (folder / "device.toml").write_text(to_toml(settings))
            words = ["chroot", root, "edge-runtime", "run", "--config", f"/srv/{name}/device.toml"]
            with (tmp_path / f"{name}.log").open("wb") as log:
                agents.append(
                    subprocess.Popen(
                        words,
                        stdout=log,
                        stderr=log,
                        env={"PATH": os.environ["PATH"], "QEMU_CPU": "cortex-a76"},
                    )
                )
        try:
            run_of = fleet.wait_until_finished()
        finally:
            for agent in agents:
                agent.terminate()
                agent.wait()
            print("".join((tmp_path / f"{name}.log").read_text()[-1500:] for name in ("ash", "birch")))
        assert run_of.rounds_committed == 1
        values = root / "srv/learned.safetensors"
        fetched = fleet.operate("run", "fetch-slices", "--output", values)
        assert fetched.returncode == 0, fetched.stderr
    shutil.copytree(package.folder, tmp_path / "package")  # predicting prepares a package beside it
    text = tiny.SENTENCES[0]
    options = ("--publisher-key", package.publisher_key, "--cap", "1G")
    there = run(
        root,
        "edge-runtime",
        "predict",
        text,
        "--package",
        "/srv/recorded/package",
        "--slices",
        "/srv/learned.safetensors",
        *options,
    )
    assert there.returncode == 0, there.stderr
    words = [
        sys.executable,
        "-m",
        "edge_runtime.cli",
        "predict",
        text,
        "--package",
        tmp_path / "package",
        "--slices",
        values,
    ]
    here = subprocess.run([*map(str, words), *options], capture_output=True, text=True, check=True, cwd=ROOT)
    answers = [json.loads(each.stdout.splitlines()[0]) for each in (there, here)]
    assert answers[0]["label"] == answers[1]["label"]
    for label, probability in answers[1]["probabilities"].items():
        assert answers[0]["probabilities"][label] == pytest.approx(probability, abs=0.02)
