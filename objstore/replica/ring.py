"""Durable writes by the kernel's own threads (io_uring): no Python thread in between, and the loop never waits.

A request is one write with RWF_DSYNC, asked for with IOSQE_ASYNC: the kernel hands it to a thread of its own at once,
so submitting takes the same few microseconds whatever the file system and the device do.

Only x86-64: the two queues are memory shared with the kernel, read and written here without fences, which that
processor orders by itself. Only where the kernel offers it (5.15; many containers forbid it). Else `Ring.open` gives
None.
Source: io_uring_setup(2), io_uring_enter(2), io_uring_register(2), <linux/io_uring.h>.
"""

import ctypes
import mmap
import os
import platform
import struct
from typing import Final, NamedTuple

ENTRIES: Final = 64
"""Requests under way at most; the kernel may use a thread for each, so none waits behind one that hangs."""
_LEFT: Final[list["Ring"]] = []
"""Closed with something under way: the kernel still writes from their memory."""

_SETUP, _ENTER, _REGISTER = 425, 426, 427
_REGISTER_EVENTFD, _REGISTER_WORKERS = 4, 19
_WRITE: Final = 23
_ASYNC: Final = 1 << 4
_SINGLE_MMAP: Final = 1 << 0
_ENTRIES_OFFSET: Final = 0x1000_0000
_PARAMETERS: Final = struct.Struct("=40x 10I 10I")
"""struct io_uring_params behind its first 40 bytes: offsets in the submission and in the completion queue."""
_FEATURES_AT: Final = 20
_ENTRY: Final = struct.Struct("=BBHiQQIIQ24x")
"""struct io_uring_sqe: opcode, flags, ioprio, fd, offset, address, length, rw_flags, user_data."""
_COMPLETION: Final = struct.Struct("=QiI")
"""struct io_uring_cqe: user_data, result, flags."""

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (ctypes.c_long,) * 7


class Request(NamedTuple):
    """Write `view` (writable memory, which stays as it is until the completion) at offset_bytes of the file `fd`."""

    number: int
    fd: int
    offset_bytes: int
    view: memoryview


class Ring:
    """One io_uring, for one thread. `eventfd` becomes readable when something has completed."""

    def __init__(self, fd: int, parameters: bytes) -> None:
        """OSError: what is asked of the kernel it doesn't offer."""
        self._fd = fd
        self.eventfd = -1
        sq, cq = (_PARAMETERS.unpack(parameters)[at : at + 7] for at in (0, 10))
        queue_bytes = max(sq[6] + 4 * ENTRIES, cq[5] + _COMPLETION.size * 2 * ENTRIES)
        self._memory = mmap.mmap(fd, queue_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._entries = mmap.mmap(
            fd, ENTRIES * _ENTRY.size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=_ENTRIES_OFFSET
        )
        self._words = memoryview(self._memory).cast("I")
        self._sq_tail, self._sq_mask = sq[1] >> 2, self._words[sq[2] >> 2]
        self._cq_head, self._cq_tail, self._cq_mask = cq[0] >> 2, cq[1] >> 2, self._words[cq[2] >> 2]
        self._completions = cq[5]
        for i in range(ENTRIES):  # the queue of indexes: always the entry of the same number
            self._words[(sq[6] >> 2) + i] = i
        self._keeps: dict[int, object] = {}
        """What the kernel writes from, by number of the request; it can't be freed or change its size."""
        self._register(_REGISTER_WORKERS, struct.pack("=II", ENTRIES, 0), 2)
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._register(_REGISTER_EVENTFD, struct.pack("=i", self.eventfd), 1)
        except OSError:
            os.close(self.eventfd)
            raise

    @classmethod
    def open(cls) -> "Ring | None":
        """A new one; None: this machine or this kernel has none for us."""
        if platform.machine() != "x86_64":
            return None
        parameters = ctypes.create_string_buffer(120)
        fd = _syscall(_SETUP, ENTRIES, ctypes.addressof(parameters), 0, 0, 0, 0)
        if fd < 0:
            return None
        ring = None
        try:
            if not int.from_bytes(parameters.raw[_FEATURES_AT : _FEATURES_AT + 4], "little") & _SINGLE_MMAP:
                return None
            ring = cls(fd, parameters.raw)
        except OSError:
            return None
        finally:
            if ring is None:
                os.close(fd)
        return ring

    def _register(self, what: int, argument: bytes, count: int) -> None:
        buffer = ctypes.create_string_buffer(argument)
        if _syscall(_REGISTER, self._fd, what, ctypes.addressof(buffer), count, 0, 0) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def submit(self, requests: list[Request]) -> int:
        """Begin these, so that at most ENTRIES are under way; how many the kernel has taken, the first ones. Whoever
        hears of a completion must not use its view before: the kernel reads it."""
        words, at = self._words, self._words[self._sq_tail]
        for number, fd, offset_bytes, view in requests:
            start = ctypes.c_char.from_buffer(view)
            self._keeps[number] = start
            _ENTRY.pack_into(
                self._entries,
                (at & self._sq_mask) * _ENTRY.size,
                *(_WRITE, _ASYNC, 0, fd, offset_bytes, ctypes.addressof(start), len(view), os.RWF_DSYNC, number),
            )
            at = at + 1 & 0xFFFF_FFFF
        words[self._sq_tail] = at
        taken = max(0, int(_syscall(_ENTER, self._fd, len(requests), 0, 0, 0, 0)))
        if taken < len(requests):
            for request in requests[taken:]:
                del self._keeps[request.number]
            words[self._sq_tail] = at - (len(requests) - taken) & 0xFFFF_FFFF
        return taken

    def completed(self) -> list[tuple[int, int]]:
        """What has completed since the last call: number, bytes written or a negative errno."""
        try:
            os.eventfd_read(self.eventfd)
        except BlockingIOError:
            return []
        words = self._words
        head, tail = words[self._cq_head], words[self._cq_tail]
        done = []
        while head != tail:
            at = self._completions + (head & self._cq_mask) * _COMPLETION.size
            number, result, _ = _COMPLETION.unpack_from(self._memory, at)
            del self._keeps[number]
            done.append((number, result))
            head = head + 1 & 0xFFFF_FFFF
        words[self._cq_head] = head
        return done

    def close(self) -> None:
        """Begin nothing more. What is under way goes on, and its memory stays."""
        if self.eventfd >= 0:
            os.close(self.eventfd)
            self.eventfd = -1
            if self._keeps:
                _LEFT.append(self)
            else:
                self._words.release()
                self._memory.close()
                self._entries.close()
                os.close(self._fd)
