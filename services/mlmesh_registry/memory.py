"""How this process holds memory: a megabyte that comes and goes all the time is not given back every time."""

import contextlib
import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENAS_MAX = -1, -2, -3, -8
# More than a chunk and what is made of it, less than the parts that go to an object store.
_MAPPED_BYTES = 4 << 20
_STEP_BYTES = 2 << 20
_KEPT_BYTES = 16 << 20


def keep_some() -> None:
    """Let glibc keep 16 MiB of what was freed, twice: a chunk else costs a page fault every 4 KiB."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_TOP_PAD, _STEP_BYTES)
        mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)
        # One for the event loop, one for all threads beside it; else each thread would keep as much.
        mallopt(_ARENAS_MAX, 2)
