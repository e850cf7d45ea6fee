"""What a VDI may show: every version of every block, and which cuts of the log are still possible after a crash.

The contract, checked exactly: after a crash the image equals the log cut at one position, at or behind everything that
was promised to be durable; a request is wholly there or not. The order of the log is known: a request is `taken` in the
loop turn in which it gets its place. So the possible images are the states after the first k requests, for each k from
`durable` to all; every block that is looked at rules out some k, and there must always be one left.
Until a life of the store has shown the whole disk, what it has shown rules out cuts for the lives after it too.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

BLOCK_BYTES: Final = 4096
STAMP: Final = struct.Struct("<QQ")
ZEROS: Final = bytes(BLOCK_BYTES)

HOLE: Final = "hole"
RESERVED: Final = "reserved"
DATA: Final = "data"
State = tuple[str, bytes]
EMPTY: Final[State] = (HOLE, ZEROS)
ZEROED: Final[State] = (RESERVED, ZEROS)


class Violation(AssertionError):
    """The store broke its contract."""


def stamped(number: int, offset_bytes: int, length_bytes: int) -> bytes:
    """Bytes that name the request that wrote them and their place."""
    first = offset_bytes // BLOCK_BYTES
    end = -(-(offset_bytes + length_bytes) // BLOCK_BYTES)
    per_block = BLOCK_BYTES // STAMP.size
    whole = b"".join([STAMP.pack(number, block) * per_block for block in range(first, end)])
    skip = offset_bytes - first * BLOCK_BYTES
    return whole[skip : skip + length_bytes]


@dataclass(slots=True, eq=False)
class Request:
    """One change. `number` is its place in the log of this life, counted from 1; 0 until it is taken."""

    action: str
    offset_bytes: int
    length_bytes: int
    data: bytes = b""
    fua: bool = False
    number: int = 0
    acked: bool = False
    changes: dict[int, State] = field(default_factory=dict)
    stamp: int = 0

    def __str__(self) -> str:
        state = "answered" if self.acked else "in flight"
        where = f"{self.offset_bytes}+{self.length_bytes}"
        return f"#{self.number} ({self.stamp:#x}) {self.action} {where}{' fua' * self.fua} ({state})"


class DiskModel:
    """One VDI. `existence`: "yes", "no", or "maybe" while its creation or deletion is under way.

    opened_in: the epoch in which it was opened last, counted from 0 (zone_scenario.py).
    copies_next: what its copies are being changed to, 0 = nothing. copies_least: the fewest that anything in it has.

    base: blocks that are not holes as this life found them. history: the requests taken since, in log order.
    allowed: after a crash, bit k = the image may be the state after k requests; None while the store serves.
    """

    def __init__(self, name: str, size_bytes: int, mode: str, copies: int) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.mode = mode
        self.copies = copies
        self.copies_next = 0
        self.copies_least = copies
        self.opened_in = 0
        self.existence = "maybe"
        self.deleting = False
        self.base: dict[int, State] = {}
        self.versions: dict[int, list[tuple[int, State]]] = {}
        self.history: list[Request] = []
        self.durable = 0
        self.allowed: int | None = None
        self.write_back = mode in ("writeback-always", "unsafe")

    @property
    def blocks(self) -> int:
        return -(-self.size_bytes // BLOCK_BYTES)

    # what clients do

    def head(self, block: int) -> State:
        """The newest version of a block."""
        found = self.versions.get(block)
        return found[-1][1] if found else self.base.get(block, EMPTY)

    def taken(self, request: Request) -> None:
        """The request gets its place in the log now. A large one may have to give its place up and begin again."""
        self.refused(request)
        self.history.append(request)
        request.number = len(self.history)
        request.changes = self._effect(request)
        for block, state in request.changes.items():
            self.versions.setdefault(block, []).append((request.number, state))

    def _effect(self, request: Request) -> dict[int, State]:
        changes: dict[int, State] = {}
        offset, length = request.offset_bytes, request.length_bytes
        end = offset + length
        first, last = offset // BLOCK_BYTES, -(-end // BLOCK_BYTES)
        if request.action == "write":
            for block in range(first, last):
                low, high = max(offset, block * BLOCK_BYTES), min(end, (block + 1) * BLOCK_BYTES)
                piece = request.data[low - offset : high - offset]
                if len(piece) < BLOCK_BYTES:
                    old = self.head(block)[1]
                    start = low - block * BLOCK_BYTES
                    piece = old[:start] + piece + old[start + len(piece) :]
                changes[block] = (DATA, piece)
            return changes
        cleared = ZEROED if request.action == "reserve" else EMPTY
        whole_first = -(-offset // BLOCK_BYTES)
        whole_last = self.blocks if end == self.size_bytes else end // BLOCK_BYTES
        if cleared is EMPTY:
            touched = self.base.keys() | self.versions.keys()
            if len(touched) < whole_last - whole_first:
                wholes = sorted(block for block in touched if whole_first <= block < whole_last)
            else:
                wholes = [block for block in range(whole_first, whole_last) if block in touched]
            for block in wholes:
                if self.head(block) is not EMPTY:
                    changes[block] = EMPTY
        else:
            for block in range(whole_first, whole_last):
                changes[block] = cleared
        if request.action != "trim":
            for block in {first, last - 1}:
                if whole_first <= block < whole_last:
                    continue
                low, high = max(offset, block * BLOCK_BYTES), min(end, (block + 1) * BLOCK_BYTES)
                old = self.head(block)[1]
                start = low - block * BLOCK_BYTES
                changes[block] = (DATA, old[:start] + bytes(high - low) + old[start + high - low :])
        return changes

    def refused(self, request: Request) -> None:
        """The request failed although it had begun to be taken: nothing of it may ever show."""
        if not request.number:
            return
        if self.history[-1] is not request:
            raise Violation(f"{self.name}: {request} failed after later requests had been taken")
        self.history.pop()
        for block in request.changes:
            self.versions[block].pop()
            if not self.versions[block]:
                del self.versions[block]
        request.number = 0

    def acked(self, request: Request) -> None:
        """The store answered that the request is done."""
        request.acked = True
        if self.mode != "unsafe" and (request.fua or not self.write_back):
            self.durable = max(self.durable, request.number)
        if request.fua:
            self.flushed_once()

    def flush_asked(self) -> int:
        """A flush begins; returns what `flushed` wants."""
        return max((request.number for request in reversed(self.history) if request.acked), default=0)

    def flushed(self, asked: int) -> None:
        """The flush succeeded."""
        if self.mode != "unsafe":
            self.durable = max(self.durable, asked)
        self.flushed_once()

    def flushed_once(self) -> None:
        """The first flush or FUA ends write-through, if the mode is to end it."""
        if self.mode == "writeback":
            self.write_back = True

    # what may be read while the store serves

    def reading(self) -> int:
        """A read begins; returns the lowest state that it may show. Only the last request taken may not show yet."""
        if self.history and not self.history[-1].acked:
            return len(self.history) - 1
        return len(self.history)

    def states(self, block: int, low: int) -> list[State]:
        """What a block was in any of the states from `low` to now."""
        versions = self.versions.get(block)
        if not versions:
            return [self.base.get(block, EMPTY)]
        found = [state for number, state in versions if number > low]
        earlier = [state for number, state in versions if number <= low]
        found.append(earlier[-1] if earlier else self.base.get(block, EMPTY))
        return found

    # what may be there after a crash

    def crashed(self) -> None:
        """The process died. What it had acknowledged without promise may be gone."""
        self.write_back = self.mode in ("writeback-always", "unsafe")
        if self.allowed is None:
            self.allowed = sum(1 << k for k in range(self.durable, len(self.history) + 1))

    def stopped(self) -> None:
        """The store was closed and reported success: everything acknowledged is durable."""
        acked = max((request.number for request in self.history if request.acked), default=0)
        self.durable = max(self.durable, acked)
        self.crashed()

    def touched(self) -> list[int]:
        """Blocks that may be something else than untouched."""
        return sorted(self.base.keys() | self.versions.keys())

    def observe(self, block: int, kind: str, content: bytes) -> None:
        """After a crash: the store shows this block. Rules out cuts; Violation when none is left."""
        assert self.allowed is not None
        shown = (kind, content)
        if block not in self.versions and self.base.get(block, EMPTY) == shown:
            return  # as in every cut
        possible = 0
        top = len(self.history) + 1
        high = top
        for number, state in reversed(self.versions.get(block, ())):
            if state == shown:
                possible |= (1 << high) - (1 << number)
            high = number
        if self.base.get(block, EMPTY) == shown:
            possible |= (1 << high) - 1
        if not self.allowed & possible:
            raise Violation(self._explain(block, shown, possible))
        self.allowed &= possible

    def _explain(self, block: int, shown: State, possible: int) -> str:
        def cuts(mask: int) -> str:
            numbers = [k for k in range(mask.bit_length()) if mask >> k & 1]
            return f"{numbers[0]}..{numbers[-1]}" if numbers else "none"

        assert self.allowed is not None
        number, where = STAMP.unpack_from(shown[1]) if shown[0] == DATA else (0, 0)
        lines = [
            f"VDI {self.name} ({self.mode}): block {block} shows {shown[0]} {shown[1][:16].hex()} "
            f"(stamp {number} of block {where}), as after requests {cuts(possible)}; "
            f"but cut must be {cuts(self.allowed)}, durable {self.durable} of {len(self.history)}",
            f"  base: {self.base.get(block, EMPTY)[0]} {self.base.get(block, EMPTY)[1][:16].hex()}",
        ]
        lines += [
            f"  after {n}: {state[0]} {state[1][:16].hex()} {self.history[n - 1]}"
            for n, state in self.versions.get(block, [])
        ]
        return "\n".join(lines)

    def settle(self) -> None:
        """The whole disk was shown: what it shows is durable and the beginning of a new life."""
        assert self.allowed
        k = self.allowed.bit_length() - 1
        for block, versions in self.versions.items():
            state = self.base.get(block, EMPTY)
            for number, newer in versions:
                if number <= k:
                    state = newer
            if state == EMPTY:
                self.base.pop(block, None)
            else:
                self.base[block] = state
        self.versions.clear()
        self.history.clear()
        self.durable = 0
        self.allowed = None
