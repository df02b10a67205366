"""System shared memory: segments of POSIX shared memory that a local client registered, for inputs and outputs.

Off unless MLMESH_SHARED_MEMORY says otherwise, and only for callers on this machine with no proxy between: whoever
registers a segment names it, so a remote caller could otherwise read and write what other processes share here.

A segment is read and written by `pread` and `pwrite`, never mapped: its owner may shrink it at any time, and a server
that touches mapped memory behind the end is killed. So an input or output costs one copy, as on the wire, without the
wire. The segment's size counts at the moment of every access.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mlmesh_runtime.calls import CURRENT, Call
from mlmesh_runtime.errors import AlreadyExists, Denied, InvalidInput, NotFound, Overloaded

REGIONS_MAX: Final = 256
"""Most regions at a time: each holds a file descriptor."""
FOLDER: Final = Path("/dev/shm")  # noqa: S108  where POSIX shared memory is, on Linux

_KEY: Final = re.compile(r"^/[A-Za-z0-9_][A-Za-z0-9._-]{0,253}$")
_NAME_CHARS_MAX: Final = 256
# Any of these was set by a proxy: the caller then is somewhere else.
_PROXIED: Final = ("x-forwarded-client-cert", "x-forwarded-for", "x-forwarded-proto", "x-envoy-peer-metadata-id")


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionStatus:
    """A region as its status tells it: `byte_size` from `offset` of the segment `key`."""

    name: str
    key: str
    offset: int
    byte_size: int


@dataclass(slots=True, kw_only=True, eq=False, weakref_slot=True)
class _Region:
    """An open segment. Closes it when nobody holds the region any more: a request under way may outlive it."""

    status: RegionStatus
    descriptor: int

    def __del__(self) -> None:
        os.close(self.descriptor)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Window:
    """Where one output is to be put: `size` bytes at `offset` of the segment."""

    region: _Region
    offset: int
    size: int

    def __len__(self) -> int:
        """Room, in bytes."""
        return self.size

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Put data at the window's start. Raises InvalidInput when it is more, or the segment became smaller."""
        view = memoryview(data).cast("B")
        if len(view) > self.size or _size(self.region.descriptor) < self.offset + len(view):
            raise _outside(self.region.status.name)
        written = 0
        while written < len(view):
            written += os.pwrite(self.region.descriptor, view[written:], self.offset + written)


def only_local() -> None:
    """Refuse the RPC being handled unless its caller is a process on this machine. Raises Denied."""
    call = CURRENT.get()
    if call is None or not is_local(call):
        raise Denied("shared memory is for callers on this machine, with no proxy between", reason="NOT_LOCAL")


def is_local(call: Call) -> bool:
    """Whether a call comes from a process on this machine, by its address and by what proxies would have added."""
    peer = call.context.peer()
    host = peer.partition(":")[2].rpartition(":")[0].strip("[]").replace("%5B", "").replace("%5D", "")
    here = peer.startswith("unix:") or host == "::1" or host.startswith("127.") or host.startswith("::ffff:127.")
    return here and not any(call.header(name) for name in _PROXIED)


class SharedMemory:
    """The regions of a process. Used on the event loop; reading and writing tmpfs does not wait for anything.

    Args:
        folder: where segments are. local: raises unless the RPC being handled may use shared memory.
    """

    def __init__(self, *, folder: Path = FOLDER, local: Callable[[], None] = only_local) -> None:
        self._folder = folder
        self._local = local
        self._regions: dict[str, _Region] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Open a segment and give the part of it a name.

        Raises AlreadyExists for a name that is taken, InvalidInput for a key that is no segment or a part that is not
        in it, Overloaded when there are too many, Denied.
        """
        self._local()
        if not 0 < len(name) <= _NAME_CHARS_MAX:
            raise InvalidInput(f"expected a region name of 1 to {_NAME_CHARS_MAX} characters", field="name")
        if name in self._regions:
            raise AlreadyExists(f"shared memory region '{name}' already in manager", reason="REGION_EXISTS")
        if len(self._regions) >= REGIONS_MAX:
            raise Overloaded(f"there are {REGIONS_MAX} shared memory regions already", reason="TOO_MANY_REGIONS")
        if not _KEY.fullmatch(key):
            raise InvalidInput(f"Unable to open shared memory region: {key[:64]!r} is no segment's key", field="key")
        descriptor = self._open(key)
        try:
            size = _size(descriptor)
            if byte_size < 1 or offset < 0 or offset + byte_size > size:
                raise InvalidInput(
                    f"failed to register shared memory region '{name}': invalid args, {byte_size} bytes at offset "
                    f"{offset} of a segment of {size} bytes",
                    field="byte_size",
                )
        except BaseException:
            os.close(descriptor)
            raise
        status = RegionStatus(name=name, key=key, offset=offset, byte_size=byte_size)
        self._regions[name] = _Region(status=status, descriptor=descriptor)

    def _open(self, key: str) -> int:
        try:
            descriptor = os.open(self._folder / key[1:], os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            text = f"Unable to open shared memory region: '{key}' ({error.strerror})"
            raise InvalidInput(text, field="key") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise InvalidInput(f"Unable to open shared memory region: '{key}' is no segment", field="key")
        return descriptor

    def unregister(self, name: str) -> None:
        """Give a region up, all of them for ""; requests under way still end well. An unknown one is no error."""
        self._local()
        if name:
            self._regions.pop(name, None)
        else:
            self._regions.clear()

    def status(self, name: str) -> Mapping[str, RegionStatus]:
        """One region, or all of them for "". Raises NotFound (REGION_NOT_FOUND), Denied."""
        self._local()
        if not name:
            return {known: region.status for known, region in sorted(self._regions.items())}
        if name not in self._regions:
            raise NotFound(f"Unable to find system shared memory region: '{name[:256]}'", reason="REGION_NOT_FOUND")
        return {name: self._regions[name].status}

    def read(self, region: str, offset: int, size: int) -> memoryview:
        """`size` bytes from `offset` of a region, a copy. Raises NotFound (REGION_NOT_FOUND), InvalidInput, Denied."""
        found, start = self._place(region, offset, size)
        data = bytearray(size)
        view = memoryview(data)
        done = 0
        while done < size:
            count = os.preadv(found.descriptor, [view[done:]], start + done)
            if not count:
                raise _outside(region)
            done += count
        return view.toreadonly()

    def window(self, region: str, offset: int, size: int) -> Window:
        """The same bytes, to put an output into."""
        found, start = self._place(region, offset, size)
        return Window(region=found, offset=start, size=size)

    def _place(self, name: str, offset: int, size: int) -> tuple[_Region, int]:
        self._local()
        region = self._regions.get(name)
        if region is None:
            raise NotFound(f"Unable to find shared memory region: '{name[:256]}'", reason="REGION_NOT_FOUND")
        known = region.status
        if offset < 0 or offset > known.byte_size or (size and offset == known.byte_size):
            raise InvalidInput(f"Invalid offset for shared memory region: '{name}'", field="shared_memory_offset")
        start = known.offset + offset
        # The size is checked before anything of that size is allocated.
        if size < 0 or offset + size > known.byte_size or start + size > _size(region.descriptor):
            raise _outside(name)
        return region, start


def _size(descriptor: int) -> int:
    return os.fstat(descriptor).st_size


def _outside(name: str) -> InvalidInput:
    return InvalidInput(
        f"Invalid offset + byte size for shared memory region: '{name}'", field="shared_memory_byte_size"
    )
