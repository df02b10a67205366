"""The few calls of NVIDIA's CUDA driver that an engine needs, through ctypes: no package, no compiler.

The primary context is used, so that memory and streams are shared with libraries built on the CUDA runtime. Every
method needs `Device.enter` on the calling thread first.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any, Final

from mlmesh_inference.engines.base import EngineError

_SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    "cuInit": (c_uint,),
    "cuDeviceGetCount": (c_void_p,),
    "cuDeviceGet": (c_void_p, c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (c_void_p, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (c_void_p, c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuGetErrorName": (c_int, c_void_p),
    "cuMemGetInfo_v2": (c_void_p, c_void_p),
    "cuMemAlloc_v2": (c_void_p, c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemHostAlloc": (c_void_p, c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuStreamCreate": (c_void_p, c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuMemsetD8Async": (c_uint64, c_ubyte, c_size_t, c_void_p),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, c_void_p),
    "cuGraphGetNodes": (c_void_p, c_void_p, c_void_p),
    "cuGraphInstantiateWithFlags": (c_void_p, c_void_p, c_uint64),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
}
_STREAM_NON_BLOCKING: Final = 1
_CAPTURE_THREAD_LOCAL: Final = 1
"""What other threads do meanwhile does not break the capture."""
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


def load_driver() -> ctypes.CDLL:
    """The driver library, initialised. Raises EngineError that says what is missing."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise EngineError("no NVIDIA driver here (libcuda.so.1 is missing)") from None
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name, None)
        if function is None:
            raise EngineError(f"the NVIDIA driver here is too old: it lacks {name}")
        function.argtypes = arguments
        function.restype = c_int
    code = library.cuInit(0)
    if code:
        raise EngineError(f"the NVIDIA driver does not start (CUDA error {code})")
    return library


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU as the driver names it: its place, name and compute capability (9, 0)."""

    ordinal: int
    name: str
    capability: tuple[int, int]


def find_gpu(ordinal: int = 0) -> Gpu:
    """The GPU of this place. Raises EngineError that says why there is none."""
    driver = load_driver()
    count = c_int()
    code = driver.cuDeviceGetCount(byref(count))
    if code or count.value == 0:
        raise EngineError("the NVIDIA driver finds no GPU" + (f" (CUDA error {code})" if code else ""))
    if ordinal >= count.value:
        raise EngineError(f"there is no GPU {ordinal}: the NVIDIA driver finds {count.value}, from 0 on")
    device = c_int()
    driver.cuDeviceGet(byref(device), ordinal)
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, 256, device)
    major, minor = c_int(), c_int()
    driver.cuDeviceGetAttribute(byref(major), _CAPABILITY_MAJOR, device)
    driver.cuDeviceGetAttribute(byref(minor), _CAPABILITY_MINOR, device)
    text = name.value.decode(errors="replace")
    return Gpu(ordinal=ordinal, name=text, capability=(major.value, minor.value))


def gpu_name(ordinal: int = 0) -> str:
    """Name of a GPU, the first by default. Raises EngineError that says why there is none."""
    return find_gpu(ordinal).name


class Device:
    """One GPU: memory, pinned host memory, one stream a caller. Raises EngineError with CUDA's name of the error."""

    def __init__(self, ordinal: int = 0) -> None:
        self._driver = load_driver()
        device = c_int()
        self._check("cuDeviceGet", byref(device), ordinal)
        self._ordinal = device.value
        context = c_void_p()
        self._check("cuDevicePrimaryCtxRetain", byref(context), device)
        self._context = context
        self._held = True

    def enter(self) -> None:
        """Make the device current on this thread."""
        self._check("cuCtxSetCurrent", self._context)

    def memory(self) -> tuple[int, int]:
        """Bytes of device memory that are free, and all of them."""
        free, total = c_size_t(), c_size_t()
        self._check("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    def allocate(self, size: int) -> int:
        """Device memory; returns its address."""
        address = c_uint64()
        self._check("cuMemAlloc_v2", byref(address), size)
        return address.value

    def free(self, address: int) -> None:
        """Give device memory back."""
        self._check("cuMemFree_v2", address)

    def allocate_host(self, size: int) -> int:
        """Pinned host memory, which copies need to be asynchronous; returns its address."""
        address = c_void_p()
        self._check("cuMemHostAlloc", byref(address), size, 0)
        return int(address.value or 0)

    def free_host(self, address: int) -> None:
        """Give pinned memory back."""
        self._check("cuMemFreeHost", address)

    def stream(self) -> int:
        """A stream that does not wait for the default stream; returns its handle."""
        handle = c_void_p()
        self._check("cuStreamCreate", byref(handle), _STREAM_NON_BLOCKING)
        return int(handle.value or 0)

    def to_device(self, device: int, host: int, size: int, stream: int) -> None:
        """Queue a copy of `size` bytes on the stream."""
        self._check("cuMemcpyHtoDAsync_v2", device, host, size, stream)

    def to_host(self, host: int, device: int, size: int, stream: int) -> None:
        """Queue a copy of `size` bytes on the stream."""
        self._check("cuMemcpyDtoHAsync_v2", host, device, size, stream)

    def zero(self, device: int, size: int, stream: int) -> None:
        """Queue the writing of zeros."""
        self._check("cuMemsetD8Async", device, 0, size, stream)

    def begin_capture(self, stream: int) -> None:
        """What is queued on the stream from now on is recorded, not run."""
        self._check("cuStreamBeginCapture_v2", stream, _CAPTURE_THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """End the recording, whatever became of it; returns a graph to launch. Raises when it cannot be one."""
        graph, executable = c_void_p(), c_void_p()
        self._check("cuStreamEndCapture", stream, byref(graph))
        nodes = c_size_t()
        try:
            self._check("cuGraphGetNodes", graph, None, byref(nodes))
            if nodes.value == 0:  # what happens when the work was queued on another device
                raise EngineError("nothing was captured")
            self._check("cuGraphInstantiateWithFlags", byref(executable), graph, 0)
        finally:
            self._check("cuGraphDestroy", graph)
        return int(executable.value or 0)

    def launch(self, graph: int, stream: int) -> None:
        """Queue all that the graph recorded."""
        self._check("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """Give a graph back."""
        self._check("cuGraphExecDestroy", graph)

    def synchronize(self, stream: int) -> None:
        """Wait for everything queued; ctypes lets other threads run meanwhile. Raises what went wrong on the GPU."""
        self._check("cuStreamSynchronize", stream)

    def destroy_stream(self, stream: int) -> None:
        """Give a stream back."""
        self._check("cuStreamDestroy_v2", stream)

    def close(self) -> None:
        """Let the primary context go; the last one out frees it. Safe to call twice."""
        if self._held:
            self._held = False
            self._check("cuDevicePrimaryCtxRelease_v2", self._ordinal)

    def _check(self, function: str, *arguments: Any) -> None:
        code = getattr(self._driver, function)(*arguments)
        if code:
            name = c_char_p()
            self._driver.cuGetErrorName(code, byref(name))
            raise EngineError(f"{function}: {(name.value or b'CUDA error').decode()} ({code})")
