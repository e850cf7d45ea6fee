"""The kernel's FUSE protocol, as far as `powercut_fs` speaks it: numbers, structures, mount and unmount.

Layouts: include/uapi/linux/fuse.h, protocol 7.31. Nodes are addressed by number here, not by path as in libfuse's upper
layer: unlinked open files, hard links and the flags of single writes (RWF_DSYNC) then mean what they mean on a disk.
"""

import array
import enum
import os
import socket
import struct
import subprocess
from typing import Final


class Op(enum.IntEnum):
    """Request numbers (enum fuse_opcode); anything else is answered with ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    RENAME2 = 45
    SYNCFS = 50


KERNEL_MINOR: Final = 31
WRITE_BYTES_MAX: Final = 1 << 20
REQUEST_BYTES_MAX: Final = WRITE_BYTES_MAX + 4096
ASYNC_READ: Final = 1 << 0
BIG_WRITES: Final = 1 << 5
PARALLEL_DIROPS: Final = 1 << 18
MAX_PAGES: Final = 1 << 22
OPEN_DIRECT_IO: Final = 1 << 0
SET_MODE, SET_SIZE, SET_MTIME, SET_MTIME_NOW = 1 << 0, 1 << 3, 1 << 5, 1 << 8
RENAME_NOREPLACE: Final = 1
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_ZERO_RANGE = 0x01, 0x02, 0x10

IN_HEADER = struct.Struct("<IIQQIIIHH")
OUT_HEADER = struct.Struct("<IiQ")
ATTR = struct.Struct("<6Q10I")
ENTRY_HEAD = struct.Struct("<4Q2I")
ATTR_HEAD = struct.Struct("<Q2I")
OPEN_OUT = struct.Struct("<QII")
INIT_IN = struct.Struct("<4I")
INIT_OUT = struct.Struct("<4I2H2I2HI7I")
STATFS_OUT = struct.Struct("<5Q4I6I")
SETATTR_IN = struct.Struct("<2I6Q8I")
MKNOD_IN = struct.Struct("<4I")
MKDIR_IN = struct.Struct("<2I")
CREATE_IN = struct.Struct("<4I")
RENAME_IN = struct.Struct("<Q")
RENAME2_IN = struct.Struct("<QII")
LINK_IN = struct.Struct("<Q")
READ_IN = struct.Struct("<QQIIQII")
WRITE_IN = struct.Struct("<QQIIQII")
HANDLE_IN = struct.Struct("<Q")
FALLOCATE_IN = struct.Struct("<QQQII")
FORGET_ONE = struct.Struct("<QQ")
DIRENT = struct.Struct("<QQII")

assert IN_HEADER.size == 40
assert ATTR.size == 88
assert ENTRY_HEAD.size + ATTR.size == 128
assert INIT_OUT.size == 64
assert STATFS_OUT.size == 80
assert SETATTR_IN.size == 88
assert READ_IN.size == WRITE_IN.size == 40


def mount(mount_point: str) -> tuple[int, socket.socket]:
    """Mount a FUSE file system with fusermount3, which needs no privilege.

    Returns the descriptor that requests come from and a socket: when its last copy closes (the daemon ended, however),
    fusermount3 unmounts. Raises OSError with what fusermount3 said.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        helper = subprocess.Popen(
            ["fusermount3", "-o", "auto_unmount,fsname=powercut,subtype=powercut", "--", mount_point],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
        )
    room = array.array("i", [0])
    _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(room.itemsize))
    if not ancillary:
        assert helper.stderr is not None
        raise OSError(f"fusermount3: {helper.stderr.read().decode().strip()} (exit code {helper.wait()})")
    room.frombytes(ancillary[0][2])
    return room[1], ours


def unmount(mount_point: str) -> None:
    """Take the mount away, lazily: a process that still stands in it does not hold it."""
    subprocess.run(["fusermount3", "-u", "-z", "--", mount_point], check=False, capture_output=True)
