"""What the machine's own files say, read from a folder that stands for its root."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.agent.host import Host


def machine(root: Path, files: dict[str, str]) -> Host:
    """A machine with these files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Host(root)


@pytest.mark.parametrize(
    ("words", "disabled"),
    [
        ("console=tty1 root=PARTUUID=1-02 rootwait", False),
        ("cgroup_disable=memory console=tty1", True),
        ("cgroup_disable=memory console=tty1 cgroup_enable=memory cgroup_memory=1", False),
        ("cgroup_enable=memory cgroup_disable=memory", True),
        ("cgroup_disable=cpu,memory", True),
        ("cgroup_disable=cpu", False),
    ],
)
def test_the_last_word_about_memory_groups_counts(tmp_path: Path, words: str, disabled: bool) -> None:
    """The firmware of a Raspberry Pi puts its words first; those of cmdline.txt come after and win."""
    assert machine(tmp_path, {"proc/cmdline": words}).memory_cgroup_disabled is disabled


def test_a_kernel_that_leaves_memory_groups_out_says_so_in_its_list(tmp_path: Path) -> None:
    """Without a word on its line; a kernel that has them says 1."""
    header = "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t0\t39\t1\n"
    assert machine(tmp_path / "a", {"proc/cgroups": header + "memory\t0\t39\t0\n"}).memory_cgroup_disabled
    assert not machine(tmp_path / "b", {"proc/cgroups": header + "memory\t0\t39\t1\n"}).memory_cgroup_disabled


def test_a_board_is_known_by_its_device_tree_before_its_firmware(tmp_path: Path) -> None:
    """The model ends in a zero byte; where there is no device tree the firmware's name counts, else nothing."""
    assert Host(tmp_path).board == ""
    assert machine(tmp_path, {"sys/class/dmi/id/product_name": "NUC\n"}).board == "NUC"
    host = machine(tmp_path, {"proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"})
    assert host.board == "Raspberry Pi 5 Model B Rev 1.0"


def test_instruction_sets_are_read_on_both_architectures(tmp_path: Path) -> None:
    """x86-64 calls them flags, arm64 Features."""
    assert "avx_vnni" in machine(tmp_path / "x", {"proc/cpuinfo": "flags\t: fpu avx_vnni\n"}).cpu_features
    arm = machine(tmp_path / "a", {"proc/cpuinfo": "Features\t: fp asimd asimddp\n"})
    assert "asimddp" in arm.cpu_features
    assert Host(tmp_path).cpu_features == frozenset()


def test_swaps_and_sensors_are_listed(tmp_path: Path) -> None:
    """Swap without its header; degrees from thousandths, zones that tell none left out."""
    host = machine(
        tmp_path,
        {
            "proc/swaps": "Filename\tType\tSize\n/dev/zram0 partition 1 0 5\n/var/swap file 1 0 -2\n",
            "sys/class/thermal/thermal_zone0/temp": "48312\n",
            "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "sys/class/thermal/thermal_zone1/temp": "",
            "sys/class/thermal/thermal_zone2/temp": "-5000\n",
        },
    )
    assert host.swaps == ["/dev/zram0", "/var/swap"]
    assert list(host.temperatures()) == [("cpu-thermal", 48.312), ("thermal_zone2", -5.0)]
