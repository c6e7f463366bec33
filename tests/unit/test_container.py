"""Limits of control groups are found in version 1 and 2, in a container and outside, at any depth. In made-up files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from gptj_dist.stages.container import cpu_quota, free_memory_bytes, memory_limit_bytes

GB = 1_000_000_000


class System:
    """A process's directory in /proc, and the control groups that are mounted for it.

    Args:
        directory: where both are made.
    """

    def __init__(self, directory: Path) -> None:
        self.proc = directory / "proc"
        self.proc.mkdir()
        self._groups = directory / "sys fs"  # mountinfo writes a blank as \\040
        self._memberships: list[str] = []
        self._mounts = ["22 1 0:20 / /proc rw,nosuid shared:5 - proc proc rw"]
        self._write()

    def join(self, controllers: str, path: str, root: str = "/") -> None:
        """The process is in the group `path`; the hierarchy is mounted from `root` on.

        Args:
            controllers: such as `cpu,cpuacct`; empty for version 2.
        """
        number = len(self._memberships) if controllers else 0
        self._memberships.append(f"{number}:{controllers}:{path}")
        mount = str(self._mount(controllers)).replace(" ", "\\040")
        kind, options = ("cgroup", f"rw,{controllers}") if controllers else ("cgroup2", "rw,nsdelegate")
        self._mounts.append(
            f"{30 + number} 25 0:{number} {root} {mount} rw,relatime shared:9 - {kind} cgroup {options}"
        )
        self._write()

    def write(self, controllers: str, group: str, files: Mapping[str, str]) -> None:
        """Files of a group, by its path below what is mounted."""
        directory = self._mount(controllers) / group
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (directory / name).write_text(text + "\n")

    def _mount(self, controllers: str) -> Path:
        return self._groups / (controllers or "unified")

    def _write(self) -> None:
        (self.proc / "cgroup").write_text("".join(f"{line}\n" for line in self._memberships))
        (self.proc / "mountinfo").write_text("".join(f"{line}\n" for line in self._mounts))


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path)


def v1_quota(quota_us: int, period_us: int = 100_000) -> dict[str, str]:
    return {"cpu.cfs_quota_us": str(quota_us), "cpu.cfs_period_us": str(period_us)}


def test_without_control_groups_there_is_no_limit(system: System, tmp_path: Path) -> None:
    for proc in (system.proc, tmp_path / "nothing"):
        assert cpu_quota(proc) is None
        assert memory_limit_bytes(proc) is None
        assert free_memory_bytes(proc) is None


@pytest.mark.parametrize(("cpu_max", "quota"), [("150000 100000", 1.5), ("max 100000", None), ("50000 10000", 5.0)])
def test_a_quota_of_version_2(system: System, cpu_max: str, quota: float | None) -> None:
    system.join("", "/")
    system.write("", "", {"cpu.max": cpu_max})
    assert cpu_quota(system.proc) == quota


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
@pytest.mark.parametrize(("quota_us", "quota"), [(250_000, 2.5), (-1, None)])
def test_a_quota_of_version_1(system: System, controllers: str, quota_us: int, quota: float | None) -> None:
    system.join(controllers, "/")
    system.write(controllers, "", v1_quota(quota_us))
    assert cpu_quota(system.proc) == quota


def test_the_least_quota_of_nested_groups_holds(system: System) -> None:
    system.join("", "/slice/service/own")
    system.write("", "slice", {"cpu.max": "300000 100000"})
    system.write("", "slice/service", {"cpu.max": "200000 100000"})
    system.write("", "slice/service/own", {"cpu.max": "400000 100000"})
    assert cpu_quota(system.proc) == 2.0


def test_the_least_quota_of_nested_groups_holds_in_version_1(system: System) -> None:
    system.join("cpu", "/docker/abc")
    system.write("cpu", "", v1_quota(-1))
    system.write("cpu", "docker", v1_quota(100_000, 50_000))
    system.write("cpu", "docker/abc", v1_quota(-1))
    assert cpu_quota(system.proc) == 2.0


@pytest.mark.parametrize("root", ["/docker/abc", "/elsewhere"])
def test_a_container_that_sees_only_its_own_group_finds_its_quota(system: System, root: str) -> None:
    """The process's path is the host's; what is mounted begins at the container's group."""
    system.join("cpu,cpuacct", "/docker/abc", root=root)
    system.write("cpu,cpuacct", "", v1_quota(75_000))
    assert cpu_quota(system.proc) == 0.75


def test_a_group_inside_a_container_is_found_below_the_containers_own(system: System) -> None:
    system.join("", "/docker/abc/inner", root="/docker/abc")
    system.write("", "", {"cpu.max": "400000 100000"})
    system.write("", "inner", {"cpu.max": "100000 100000"})
    assert cpu_quota(system.proc) == 1.0


def test_both_versions_side_by_side_are_read(system: System) -> None:
    """Hybrid systems keep controllers in version 1 and mount an empty version 2."""
    system.join("memory", "/")
    system.join("cpu", "/")
    system.join("", "/")
    system.write("", "", {"cgroup.procs": ""})
    system.write("cpu", "", v1_quota(100_000))
    system.write("memory", "", {"memory.limit_in_bytes": str(3 * GB), "memory.usage_in_bytes": "0"})
    assert cpu_quota(system.proc) == 1.0
    assert memory_limit_bytes(system.proc) == 3 * GB


def test_the_tightest_memory_group_decides_what_is_free_and_page_cache_counts_as_free(system: System) -> None:
    system.join("", "/slice/own")
    stat = "anon 5\ninactive_file {}\nactive_file 7"
    system.write("", "slice", {"memory.max": str(8 * GB), "memory.current": str(7 * GB)})
    system.write("", "slice", {"memory.stat": stat.format(2 * GB)})
    system.write("", "slice/own", {"memory.max": str(6 * GB), "memory.current": str(1 * GB)})
    system.write("", "slice/own", {"memory.stat": stat.format(0)})
    assert memory_limit_bytes(system.proc) == 6 * GB
    assert free_memory_bytes(system.proc) == 3 * GB


def test_memory_of_version_1(system: System) -> None:
    system.join("memory", "/pod")
    files = {"memory.limit_in_bytes": str(4 * GB), "memory.usage_in_bytes": str(3 * GB)}
    system.write("memory", "pod", {**files, "memory.stat": f"inactive_file 3\ntotal_inactive_file {GB}"})
    assert memory_limit_bytes(system.proc) == 4 * GB
    assert free_memory_bytes(system.proc) == 2 * GB
