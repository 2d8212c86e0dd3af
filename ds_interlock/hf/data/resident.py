"""Gives back the pages of mapped Arrow files, so that a process is not as large as the data that it has read.

The system would take them back only when it needs memory, and what ends a process for its size counts them.
"""

import ctypes
import os
from pathlib import Path

_MOST = 2**28  # bytes: a quarter of a GiB
_DONTNEED = 4  # of madvise

_least = 0  # bytes of mapped files, above all libraries, after the last time


def release_pages() -> None:
    """Gives pages back if many have come since the last time; to be called wherever much is read.

    They stay in the system's page cache, from where the next read gets them again. The mappings stay, too, so
    that what points into them is valid. Does nothing but on Linux.
    """
    global _least
    if not Path("/proc/self/statm").exists() or _mapped_bytes() < _least + _MOST:
        return
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, access, *_ = line.split(maxsplit=2)
        if access.startswith("r--") and line.endswith(".arrow"):  # only read: nothing can get lost
            start, stop = (int(end, 16) for end in place.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _DONTNEED)
    _least = _mapped_bytes()


def _mapped_bytes() -> int:
    """Resident bytes of this process that are those of files."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")
