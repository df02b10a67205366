"""What the machine has is found out as the kernel tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlmesh_training.capacity import present
from mlmesh_training.options import Resources

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "dev").mkdir()
    (tmp_path / "meminfo").write_text("MemTotal:       16777216 kB\nMemFree:  1 kB\n")
    return {name: tmp_path / name for name in ("cgroup", "meminfo")} | {"devices": tmp_path / "dev"}


def test_without_limits_it_is_the_machine(machine: dict[str, Path]) -> None:
    assert present({}, affinity=8, **machine) == Resources(cpus=8.0, memory_bytes=16 * GIB, gpus=0)
    (machine["cgroup"] / "cpu.max").write_text("max 100000\n")
    (machine["cgroup"] / "memory.max").write_text("max\n")
    assert present({}, affinity=8, **machine) == Resources(cpus=8.0, memory_bytes=16 * GIB, gpus=0)


def test_a_container_has_what_its_control_group_has(machine: dict[str, Path]) -> None:
    (machine["cgroup"] / "cpu.max").write_text("150000 100000\n")
    (machine["cgroup"] / "memory.max").write_text(f"{GIB}\n")
    assert present({}, affinity=8, **machine) == Resources(cpus=1.5, memory_bytes=GIB, gpus=0)
    assert present({}, affinity=1, **machine).cpus == 1.0


@pytest.mark.parametrize(
    ("visible", "gpus"), [(None, 2), ("", 0), ("-1", 0), ("0", 1), ("1,0", 2), ("0,-1,1", 1), ("GPU-8f,MIG-1", 2)]
)
def test_gpus_are_devices_or_those_that_cuda_is_shown(machine: dict[str, Path], visible: str | None, gpus: int) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (machine["devices"] / name).touch()
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert present(environ, affinity=1, **machine).gpus == gpus


def test_this_machine_has_something() -> None:
    here = present({})
    assert here.cpus > 0
    assert here.memory_bytes > 1 << 28
