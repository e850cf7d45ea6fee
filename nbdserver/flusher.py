"""The process among its own clients: a kernel that swaps or writes back to one of our disks must not be waited for.

A kernel that is short of memory writes pages to disks that we serve. If we then have to wait for memory of our own, and
the kernel for us, neither goes on. So the process marks itself as one that such writes go through (PR_SET_IO_FLUSHER,
prctl(2), Linux 5.6): its allocations never start writes to disks. With `--swap` all its memory stays (mlockall(2)).
"""

import ctypes
import os
import resource
from typing import Final

from objstore.errors import InvalidRequest

PR_SET_IO_FLUSHER: Final = 57
MCL_CURRENT: Final = 1
MCL_FUTURE: Final = 2
MCL_ONFAULT: Final = 4
CAPABILITY_VERSION_3: Final = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilityData(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def mark_as_flusher() -> bool:
    """Mark this thread and all that it starts later; False: it may not (CAP_SYS_RESOURCE), or the kernel is older.

    Then give up the capabilities of a user other than root: with CAP_SYS_RESOURCE the zones' file systems would let us
    write to the blocks that they keep for root, and a zone would be full later than it says.
    """
    marked = _libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0
    if os.geteuid() != 0:
        header = _CapabilityHeader(CAPABILITY_VERSION_3, 0)
        _libc.capset(ctypes.byref(header), (_CapabilityData * 2)())  # giving up can't fail
    return bool(marked)


def lock_memory() -> None:
    """Keep in memory whatever the process has and will have touched. InvalidRequest: it may not keep all of it."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY and os.geteuid() != 0:
        raise InvalidRequest(
            f"--swap: this user may lock {soft} bytes of memory, and all has to be (LimitMEMLOCK=infinity, ulimit -l)"
        )
    # What is there already comes in at once; what comes later stays once it was used, or each thread's stack would be
    # 8 MiB at its start.
    for flags in (MCL_CURRENT, MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT):
        if _libc.mlockall(flags):
            raise InvalidRequest(f"--swap: memory can't be locked: {os.strerror(ctypes.get_errno())}")
