"""Shared memory: what may be registered, what is read and written, and what its owner may do meanwhile."""

from __future__ import annotations

import contextlib
import gc
import os
from pathlib import Path
from typing import Any

import pytest

from mlmesh_inference.oip.shared_memory import REGIONS_MAX, SharedMemory, is_local, only_local
from mlmesh_runtime.errors import AlreadyExists, Denied, InvalidInput, MeshError, NotFound, Overloaded


def held_open(folder: Path) -> list[str]:
    """Names of what this process has open in a folder."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            path = Path(os.readlink(f"/proc/self/fd/{number}"))
            if path.parent == folder:
                found.append(path.name)
    return found


@pytest.fixture
def memory(tmp_path: Path) -> SharedMemory:
    (tmp_path / "seg").write_bytes(bytes(range(64)))
    return SharedMemory(folder=tmp_path, local=lambda: None)


def test_a_region_is_read_and_written_where_it_was_registered(memory: SharedMemory, tmp_path: Path) -> None:
    memory.register("in", "/seg", 16, 32)
    assert bytes(memory.read("in", 4, 3)) == bytes([20, 21, 22])
    window = memory.window("in", 30, 2)
    assert len(window) == 2
    window.write(b"ab")
    assert (tmp_path / "seg").read_bytes()[46:48] == b"ab"
    status = memory.status("")["in"]
    assert (status.key, status.offset, status.byte_size) == ("/seg", 16, 32)


@pytest.mark.parametrize(
    ("name", "key", "offset", "size"),
    [
        ("", "/seg", 0, 1),
        ("x" * 257, "/seg", 0, 1),
        ("in", "seg", 0, 1),
        ("in", "/../seg", 0, 1),
        ("in", "/a/b", 0, 1),
        ("in", "/.", 0, 1),
        ("in", "/seg\n", 0, 1),
        ("in", "/gone", 0, 1),
        ("in", "/link", 0, 1),
        ("in", "/folder", 0, 1),
        ("in", "/pipe", 0, 1),
        ("in", "/seg", 0, 0),
        ("in", "/seg", 0, 65),
        ("in", "/seg", 64, 1),
        ("in", "/seg", 1 << 63, 1),
        ("in", "/seg", 0, (1 << 64) - 1),
    ],
)
def test_what_cannot_be_registered(
    name: str, key: str, offset: int, size: int, memory: SharedMemory, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "seg")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidInput):
        memory.register(name, key, offset, size)
    assert memory.status("") == {}
    assert held_open(tmp_path) == []


@pytest.mark.parametrize(("offset", "size"), [(33, 0), (0, 33), (-1, 1), (0, -1), (1 << 70, 1), (0, 1 << 70)])
def test_a_request_stays_inside_of_its_region(offset: int, size: int, memory: SharedMemory) -> None:
    memory.register("in", "/seg", 0, 32)
    with pytest.raises(InvalidInput, match="shared memory region: 'in'"):
        memory.read("in", offset, size)
    with pytest.raises(InvalidInput, match="shared memory region: 'in'"):
        memory.window("in", offset, size)


def test_a_segment_that_shrinks_is_refused_and_nothing_else_happens(memory: SharedMemory, tmp_path: Path) -> None:
    memory.register("in", "/seg", 0, 64)
    window = memory.window("in", 0, 64)
    os.truncate(tmp_path / "seg", 10)
    for use in (lambda: memory.read("in", 0, 64), lambda: window.write(b"x" * 64)):
        with pytest.raises(InvalidInput):
            use()
    assert (tmp_path / "seg").stat().st_size == 10
    assert bytes(memory.read("in", 0, 10)) == bytes(range(10))


def test_more_than_the_window_holds_is_refused(memory: SharedMemory, tmp_path: Path) -> None:
    memory.register("in", "/seg", 0, 64)
    with pytest.raises(InvalidInput):
        memory.window("in", 0, 4).write(b"12345")
    assert (tmp_path / "seg").read_bytes() == bytes(range(64))


def test_a_request_under_way_outlives_its_region_and_then_the_file_is_closed(
    memory: SharedMemory, tmp_path: Path
) -> None:
    memory.register("in", "/seg", 0, 64)
    window = memory.window("in", 0, 4)
    memory.unregister("in")
    (tmp_path / "other").write_bytes(b"untouched")
    other = os.open(tmp_path / "other", os.O_RDWR)
    window.write(b"late")
    os.close(other)
    assert (tmp_path / "seg").read_bytes()[:4] == b"late"
    assert (tmp_path / "other").read_bytes() == b"untouched"
    assert held_open(tmp_path) == ["seg"]
    del window
    gc.collect()
    assert held_open(tmp_path) == []


def test_names_are_taken_once_and_given_back(memory: SharedMemory) -> None:
    memory.register("in", "/seg", 0, 64)
    with pytest.raises(AlreadyExists, match="already in manager"):
        memory.register("in", "/seg", 0, 64)
    memory.register("out", "/seg", 0, 64)
    memory.unregister("nobody")
    memory.unregister("in")
    assert list(memory.status("")) == ["out"]
    memory.unregister("")
    for use in (lambda: memory.status("out"), lambda: memory.read("out", 0, 1), lambda: memory.window("out", 0, 1)):
        with pytest.raises(NotFound, match="Unable to find"):
            use()


def test_regions_are_bounded(memory: SharedMemory) -> None:
    for number in range(REGIONS_MAX):
        memory.register(str(number), "/seg", 0, 1)
    with pytest.raises(Overloaded):
        memory.register("more", "/seg", 0, 1)


class FakeCall:
    """What is_local looks at of a Call."""

    def __init__(self, peer: str, **headers: str) -> None:
        self.context = self
        self._peer = peer
        self._headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def peer(self) -> str:
        return self._peer

    def header(self, name: str) -> str | None:
        return self._headers.get(name)


@pytest.mark.parametrize(
    ("call", "local"),
    [
        (FakeCall("ipv4:127.0.0.1:5"), True),
        (FakeCall("ipv6:[::1]:5"), True),
        (FakeCall("ipv6:%5B::1%5D:5"), True),
        (FakeCall("unix:"), True),
        (FakeCall("ipv4:10.0.0.1:5"), False),
        (FakeCall("ipv6:[2001:db8::127.0.0.1]:5"), False),
        (FakeCall("ipv4:127.0.0.6:5", x_forwarded_client_cert="By=spiffe://x"), False),
        (FakeCall("ipv4:127.0.0.6:5", x_forwarded_proto="http"), False),
        (FakeCall(""), False),
    ],
)
def test_who_is_local(call: Any, local: bool) -> None:
    assert is_local(call) is local


def test_outside_of_an_rpc_nobody_is_local() -> None:
    with pytest.raises(Denied):
        only_local()
    memory = SharedMemory()
    refused: list[type[MeshError]] = []
    for use in (
        lambda: memory.register("x", "/seg", 0, 1),
        lambda: memory.unregister(""),
        lambda: memory.status(""),
        lambda: memory.read("x", 0, 1),
    ):
        with pytest.raises(Denied):
            use()
        refused.append(Denied)
    assert len(refused) == 4
