"""What a disk may show after a crash: a reference disk that knows every version of every block.

The contract that is checked: the image equals the log cut at one position, at or after everything flushed; the log's
order agrees with the order of acknowledgements (answered before another was sent = earlier in the log); a request is
wholly there or not at all. Requests that were in flight, or failed, may be there.

Each block carries the number of the write that made it, so an image names its history. That history is legal if the
writes can each be given one moment between being sent and being answered such that, of the writes up to some moment,
the last one to each block is the one shown (the check is exact: `Oracle.check`).
Limits: whole blocks of 4096 bytes; writes only; the history of one life of the server is kept in memory.
"""

import math
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

BLOCK_BYTES: Final = 4096
STAMP: Final = struct.Struct("<QQ")
STAMPS_PER_BLOCK: Final = BLOCK_BYTES // STAMP.size


class Violation(AssertionError):
    """The image can't have come from the requests that were made."""


@dataclass(slots=True, eq=False)
class Write:
    """One write. `sent` and `answered` are moments on the oracle's clock; infinite while (or if never) answered."""

    number: int
    first: int
    count: int
    sent: int
    answered: float = math.inf
    must_survive: bool = False

    @property
    def blocks(self) -> range:
        return range(self.first, self.first + self.count)

    def payload(self) -> bytes:
        """The bytes to write: every 16 of them name this write and the block."""
        return b"".join(block_content(self.number, block) for block in self.blocks)

    def __str__(self) -> str:
        state = "flushed" if self.must_survive else "answered" if self.answered < math.inf else "in flight"
        return f"write {self.number} of blocks {self.first}+{self.count} ({state})"


def block_content(number: int, block: int) -> bytes:
    """Block `block` as write `number` left it; number 0 is a disk that was never written."""
    return STAMP.pack(number, block) * STAMPS_PER_BLOCK if number else bytes(BLOCK_BYTES)


class Oracle:
    """The history of one disk. Call its methods in the order of events: `submit` before a request's first byte is sent,
    `answer` and `flushed` after the reply was received."""

    def __init__(self, size_bytes: int) -> None:
        self.block_count = size_bytes // BLOCK_BYTES
        self._base = [0] * self.block_count
        self._writes: dict[int, Write] = {}
        self._clock = 0
        self._next_number = 1

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def submit(self, first_block: int, block_count: int) -> Write:
        """A write is about to be sent."""
        assert first_block >= 0
        assert 0 < block_count <= self.block_count - first_block
        write = Write(self._next_number, first_block, block_count, self._tick())
        self._next_number += 1
        self._writes[write.number] = write
        return write

    def answer(self, write: Write, *, durable: bool = False) -> None:
        """A write succeeded; durable: it had FUA. A write that failed stays as if it were still in flight."""
        write.answered = self._tick()
        write.must_survive |= durable

    def flush_sent(self) -> int:
        """A flush is about to be sent; returns what `flushed` wants."""
        return self._tick()

    def flushed(self, sent: int) -> None:
        """A flush succeeded: every write that was answered before the flush was sent must survive."""
        for write in self._writes.values():
            if write.answered < sent:
                write.must_survive = True

    @property
    def answered_count(self) -> int:
        return sum(write.answered < math.inf for write in self._writes.values())

    def check(self, image: bytes | bytearray | memoryview) -> int:
        """Raise Violation unless this image may be what a crash left; returns how many of this life's writes it holds.

        1. Every block names one write of it, or is as the last life left it.
        2. The cut takes in what is shown, what was flushed, and whatever was answered before any of these was sent.
        3. Each block whose writes are in the cut shows one of them, and that one can be the last of them: there is an
           order of the cut's writes that agrees with sent/answered and in which it is.
        """
        shown = self._shown(image)
        last_sent = max((w.sent for w in self._writes.values() if w.must_survive), default=0)
        last_sent = max(last_sent, max((w.sent for w in shown.values()), default=0))
        named = {write.number for write in shown.values()}
        cut = [
            write
            for write in self._writes.values()
            if write.must_survive or write.number in named or write.answered < last_sent
        ]
        later: dict[int, list[Write]] = {write.number: [] for write in cut}
        earlier_count = dict.fromkeys(later, 0)
        for write in cut:
            for block in write.blocks:
                last = shown.get(block)
                if last is None:
                    raise Violation(self._lost(write, block, cut))
                if last is not write:
                    later[write.number].append(last)
                    earlier_count[last.number] += 1
        _can_be_ordered(cut, later, earlier_count)
        return len(cut)

    def restart(self, image: bytes | bytearray | memoryview) -> None:
        """A new life begins with this image, which `check` accepted."""
        for block, write in self._shown(image).items():
            self._base[block] = write.number
        self._writes.clear()

    def _shown(self, image: bytes | bytearray | memoryview) -> dict[int, Write]:
        """Block -> the write of this life that it shows."""
        view = memoryview(image)
        if len(view) != self.block_count * BLOCK_BYTES:
            raise Violation(f"the image has {len(view)} bytes instead of {self.block_count * BLOCK_BYTES}")
        shown = {}
        for block, number in enumerate(_numbers(view)):
            content = view[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
            if content != block_content(number, block):
                raise Violation(f"block {block} is torn or foreign: begins {content[:32].hex()}")
            if number == self._base[block]:
                continue
            write = self._writes.get(number)
            if write is None:
                raise Violation(f"block {block} shows write {number} of an earlier life, not {self._base[block]}")
            if block not in write.blocks:
                raise Violation(f"block {block} shows {write}, which did not write it")
            shown[block] = write
        return shown

    def _lost(self, write: Write, block: int, cut: Iterable[Write]) -> str:
        if write.must_survive:
            return f"block {block} shows no write of this life: lost {write}"
        later = next((w for w in cut if w.sent > write.answered), None)
        if later is None:
            return f"block {block} shows no write of this life: {write} is there in part"
        return f"block {block} shows no write of this life: lost {write}, but {later}, sent after its answer, is there"


def _numbers(view: memoryview) -> Iterator[int]:
    for offset in range(0, len(view), BLOCK_BYTES):
        number, _ = STAMP.unpack_from(view, offset)
        yield number


def _can_be_ordered(cut: list[Write], later: dict[int, list[Write]], earlier_count: dict[int, int]) -> None:
    """Give each write the earliest moment after all that must come before it; Violation if its answer was earlier."""
    moment = {write.number: write.sent for write in cut}
    ready = deque(write for write in cut if earlier_count[write.number] == 0)
    placed = 0
    while ready:
        write = ready.popleft()
        placed += 1
        if moment[write.number] > write.answered:
            raise Violation(
                f"{write} is shown over a write that was sent after its answer, at {moment[write.number]} on the clock"
            )
        for last in later[write.number]:
            moment[last.number] = max(moment[last.number], moment[write.number])
            earlier_count[last.number] -= 1
            if earlier_count[last.number] == 0:
                ready.append(last)
    if placed < len(cut):
        stuck = [str(write) for write in cut if earlier_count[write.number] > 0]
        raise Violation(f"requests are there in part, each over the other: {', '.join(stuck[:4])}")
