"""Sealed segments: each copy read as a whole and held against its directory, bad copies against good ones.

A directory that is valid judges every page of its file: page 0 and record headers by their own checksums, data blocks
by the directory's. So one copy with a valid directory, and for each block any copy that has it right, make a whole
segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from crc32c import crc32c

from objstore.check.layout import (
    FOOTER_BYTES,
    PAGE,
    SEGMENT_BYTES_MAX,
    Damaged,
    Directory,
    Owner,
    SegmentHeader,
    directory,
    directory_bytes,
    join,
    record_header,
    same_operations,
    segment_header,
)
from objstore.check.members import Store
from objstore.check.report import Repair, Severity


def segment_name(log: int, number: int) -> str:
    return f"log/{log:06x}/{number:07x}"


class SealedCopy(NamedTuple):
    """One copy. bad: blocks of its file that are not what the directory says, each with the reason."""

    directory: Directory
    header: SegmentHeader | None
    bad: dict[int, str]
    size: int


def verify_sealed(data: bytes, owner: Owner, number: int) -> SealedCopy:
    """Check a whole file. Damaged: it has no valid directory, or its directory contradicts valid records."""
    table = directory(data, owner, number, len(data))
    view = memoryview(data)
    bad: dict[int, str] = {}
    header = None
    try:
        header = segment_header(view[:PAGE], owner, number)
        if header.generation != table.generation:
            raise Damaged(f"the header has generation {header.generation}, the directory {table.generation}")
    except Damaged as error:
        bad[0] = str(error)
    _verify_records(view, owner, number, table, bad)
    heads = set(table.headers.tolist())
    for block, crc in enumerate(table.crcs.tolist()):
        if block not in heads and block and crc32c(view[block * PAGE : block * PAGE + PAGE]) != crc:
            bad[block] = "the data has a wrong checksum"
    start = table.table_start // PAGE
    if view[start * PAGE : table.table_start].tobytes().strip(b"\0"):
        bad[start] = "the space in front of the directory's table is not zero"
    return SealedCopy(table, header, bad, len(data))


def _verify_records(view: memoryview, owner: Owner, number: int, table: Directory, bad: dict[int, str]) -> None:
    """Records against the directory; unreadable ones go into `bad`."""
    ends = [*table.headers.tolist()[1:], table.blocks]
    previous = table.previous_crc
    position: int | None = table.first_position
    if table.crcs[0]:
        raise Damaged("the directory has a checksum for page 0")
    parts = []
    durable = wall = 0
    for block, end, crc in zip(table.headers.tolist(), ends, table.header_crcs.tolist(), strict=True):
        try:
            record = record_header(view[block * PAGE : block * PAGE + PAGE], owner, number, block)
            if record.crc != crc:
                raise Damaged("another record header than the directory's")
        except Damaged as error:
            bad[block] = str(error)
            position = None
        else:
            if record.generation != table.generation or record.previous_crc != previous or record.end != end:
                raise Damaged(f"the record at block {block} does not follow the one before it")
            if position is not None and record.position != position:
                raise Damaged(f"the record at block {block} has position {record.position} instead of {position}")
            if table.crcs[block] or not np.array_equal(record.crcs, table.crcs[block + 1 : end]):
                raise Damaged(f"the directory contradicts the record at block {block}")
            position = record.last_position + 1
            parts.append(record.operations)
            durable, wall = max(durable, record.durable_upto), record.wall_us
        previous = crc
    if len(parts) < len(table.headers):
        return
    if not same_operations(join(parts), table.operations):
        raise Damaged("the directory's operations are not those of its records")
    if (durable, wall) != (table.durable_upto, table.wall_us) or position != table.last_position + 1:
        raise Damaged("the footer contradicts the records")


def read_directory(store: Store, zone: int, owner: Owner, number: int) -> Directory:
    """The directory of one copy, without the rest of the file."""
    reader, name = store.zones[zone], segment_name(owner.log, number)
    try:
        size = reader.size(name)
        if size is None or size < PAGE:
            raise Damaged("is cut short")
        length = directory_bytes(reader.read(name, size - FOOTER_BYTES, FOOTER_BYTES))
        if length > size:
            raise Damaged("is cut short")
        return directory(reader.read(name, size - length, length), owner, number, size)
    except OSError as error:
        raise Damaged(f"cannot be read: {error.strerror or error}") from error


@dataclass
class Verified:
    """What is known of a segment after all its copies were read. directory: None if no copy has a valid one.

    good: zones (indexes) whose copy is whole. lost: blocks that no copy has.
    """

    number: int
    directory: Directory | None = None
    blocks: int = 0
    good: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)


def check_sealed(
    store: Store, owner: Owner, number: int, zones: Sequence[int], *, seal_crc: int | None, vdi: str, repairable: bool
) -> Verified:
    """Read every copy of a segment that is sealed on `zones`, and report those that are bad.

    seal_crc: the one that counts, None if no checkpoint says. Lost blocks are returned, not reported: whether they
    matter is for the map to say.
    """
    name = segment_name(owner.log, number)
    result = Verified(number)
    problems: dict[int, str] = {}
    partly: dict[int, SealedCopy] = {}
    for zone in zones:
        try:
            data = store.load(zone, name, SEGMENT_BYTES_MAX)
            if data is None:
                problems[zone] = "is missing"
                continue
            copy = verify_sealed(data, owner, number)
            if seal_crc is not None and copy.directory.seal_crc != seal_crc:
                raise Damaged(f"is sealed with CRC {copy.directory.seal_crc:08x}, the checkpoint says {seal_crc:08x}")
        except Damaged as error:
            problems[zone] = str(error)
            continue
        first = next(iter(partly.values()), None)
        if first is not None and copy.directory.seal_crc != first.directory.seal_crc:
            problems[zone] = "is sealed with another CRC than another zone's copy"
            repairable = False  # both are valid: which is right can't be told
            continue
        partly[zone] = copy
        if copy.bad:
            block = min(copy.bad)
            problems[zone] = f"block {block}: {copy.bad[block]}"
            if len(copy.bad) > 1:
                problems[zone] += f"; {len(copy.bad)} bad blocks in all"
        else:
            result.good.append(zone)
            result.directory, result.blocks = copy.directory, copy.size // PAGE
    store.report.checked["segment copies"] += len(zones)
    if not result.good and partly:
        _settle_parts(store, owner, number, zones, partly, result)
    headers = {copy.header.page for copy in partly.values() if copy.header is not None}
    if len(headers) > 1:
        store.add(Severity.FAULT, "copies-differ", "the headers of its copies differ", name=name, vdi=vdi)
    whole = not result.lost
    for zone, problem in problems.items():
        repair = None
        if repairable and whole and result.directory is not None:
            sources = [*result.good, *partly, *problems]
            repair = Repair(zone, name, _Assembly(store, owner, result.directory, number, sources))
        kind = "missing-copy" if problem == "is missing" else "bad-copy"
        store.add(Severity.FAULT, kind, problem, zone=zone, name=name, vdi=vdi, repair=repair)
    return result


def _settle_parts(
    store: Store, owner: Owner, number: int, zones: Sequence[int], partly: dict[int, SealedCopy], result: Verified
) -> None:
    """No copy is whole: find for each bad block of one of them a copy that has it."""
    zone, best = min(partly.items(), key=lambda item: len(item[1].bad))
    result.directory, result.blocks = best.directory, best.size // PAGE
    others = [other for other in zones if other != zone]
    result.lost = [
        block
        for block in sorted(best.bad)
        if block < best.directory.blocks and _find_block(store, owner, number, best.directory, block, others) is None
    ]


def _find_block(
    store: Store, owner: Owner, number: int, table: Directory, block: int, zones: Sequence[int]
) -> bytes | None:
    """The right contents of a block, from any of these zones."""
    name = segment_name(owner.log, number)
    for zone in zones:
        try:
            page = store.zones[zone].read(name, block * PAGE, PAGE)
            if block == 0:
                if segment_header(page, owner, number).generation == table.generation:
                    return page
            elif block in table.headers:
                at = int(np.searchsorted(table.headers, block))
                if record_header(page, owner, number, block).crc == table.header_crcs[at]:
                    return page
            elif len(page) == PAGE and crc32c(page) == table.crcs[block]:
                return page
        except (OSError, Damaged):
            continue
    return None


class _Assembly:
    """A repair's data: a whole segment out of what its copies have."""

    def __init__(self, store: Store, owner: Owner, table: Directory, number: int, zones: Sequence[int]) -> None:
        self._store = store
        self._owner = owner
        self._seal_crc = table.seal_crc
        self._number = number
        self._zones = zones

    def __call__(self) -> bytes:
        store, owner, number = self._store, self._owner, self._number
        for zone in self._zones:
            try:
                data = store.load(zone, segment_name(owner.log, number), SEGMENT_BYTES_MAX)
                if data is None:
                    continue
                copy = verify_sealed(data, owner, number)
            except Damaged:
                continue
            if copy.directory.seal_crc != self._seal_crc:
                continue
            whole = bytearray(data)
            for block in copy.bad:
                if block >= copy.directory.blocks:  # what fills the directory's first page up
                    whole[block * PAGE : copy.directory.table_start] = bytes(copy.directory.table_start % PAGE)
                    continue
                page = _find_block(store, owner, number, copy.directory, block, self._zones)
                if page is not None:
                    whole[block * PAGE : block * PAGE + PAGE] = page
            if not verify_sealed(bytes(whole), owner, number).bad:
                return bytes(whole)
        raise Damaged("no whole segment can be put together any more")
