"""The end of a log: sealed segments where all their zones agree, then record after record from any copy.

FORMAT.md, Opening a log, steps 2 to 4, without changing anything.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from crc32c import crc32c

from objstore.check.layout import (
    PAGE,
    SEGMENT_BYTES_MAX,
    U64,
    Damaged,
    Directory,
    Operations,
    Owner,
    Record,
    SegmentHeader,
    directory,
    join,
    record_header,
    segment_header,
)
from objstore.check.members import Store
from objstore.check.report import Severity
from objstore.check.segments import Verified, check_sealed, segment_name

_RECORD_MAGIC: Final = int.from_bytes(b"SHEEPREC", "little")


@dataclass
class Tail:
    """What the end of a log holds. position, crc: of its last record. claim: what was durable, by any header.

    segments: (number, operations) in log order. sealed: those that were checked as sealed.
    """

    position: int
    crc: int
    claim: int = 0
    segments: list[tuple[int, Operations]] = field(default_factory=list)
    sealed: list[Verified] = field(default_factory=list)


class Row(NamedTuple):
    """A segment as a head's tail lists it. zones: a mask."""

    number: int
    seal_crc: int
    zones: int


@dataclass
class Rules:
    """How a log's end is to be judged.

    rows: segments that its head lists. holders: zones (indexes) whose copy of another one is believed, by its header.
    seals: whether sealed segments are kept as they are. clean: everything was durable when it was last written to.
    on_record: gets every record of step 3 with its data.
    """

    holders: Callable[[SegmentHeader], Sequence[int]]
    rows: Mapping[int, Row] = field(default_factory=dict)
    vdi: str = ""
    seals: bool = True
    clean: bool = False
    on_record: Callable[[Record, memoryview], None] | None = None


class _Copy(NamedTuple):
    data: bytes
    header: SegmentHeader | None
    seal: Directory | None


class _Lack(NamedTuple):
    """A copy that lacks records which another one has. position: of the first of them."""

    zone: int
    name: str
    position: int
    sealed: bool
    missing: bool


def read_tail(
    store: Store,
    owner: Owner,
    listed: Mapping[int, Sequence[int]],
    numbers: Sequence[int],
    start: tuple[int, int],
    rules: Rules,
) -> Tail:
    """Follow the log through the segments `numbers` (rising). start: position and CRC of the record before them.

    listed: zones that have a file of each.
    """
    tail = Tail(*start)
    lacks: list[_Lack] = []
    stopped = not rules.seals
    for number in numbers:
        name = segment_name(owner.log, number)
        row = rules.rows.get(number)
        copies = {zone: _copy(store, owner, number, zone) for zone in listed.get(number, ())}
        header = next((copy.header for copy in copies.values() if copy.header is not None), None)
        if row is not None:
            expected, absent = store.by_mask(row.zones)
        else:
            expected, absent = list(rules.holders(header)) if header is not None else [], []
            copies = {zone: copy for zone, copy in copies.items() if zone in expected}
        if row is None and expected and not copies:
            stopped = True  # its holders are here without it: it never got a record
            continue
        if not copies or header is None:
            text = "no zone that may be believed has it" if header is not None else "no zone has a valid header of it"
            grave = absent or (row is None and store.missing)
            severity = Severity.UNAVAILABLE if grave else Severity.DAMAGE
            if row is not None or header is not None:
                store.add(severity, "segment-lost", text, name=name, vdi=rules.vdi)
            stopped = True
            continue
        for copy in copies.values():
            tail.claim = max(tail.claim, _claim(copy, owner, number, header.generation))
        if not stopped and _kept(tail, copies, expected, row):
            seal_crc = None if row is None else row.seal_crc
            verified = check_sealed(
                store, owner, number, expected, seal_crc=seal_crc, vdi=rules.vdi, repairable=row is not None
            )
            tail.sealed.append(verified)
            table = verified.directory
            if table is not None:
                tail.segments.append((number, table.operations))
                tail.position, tail.crc = table.last_position, table.last_crc
                continue
        stopped = True
        _records(store, owner, number, header.generation, (copies, expected), tail, lacks, rules)
    for lack in lacks:
        _report(store, tail, lack, rules)
    if tail.position < tail.claim:
        text = f"the log ends at position {tail.position}, and everything up to {tail.claim} was flushed"
        _lost(store, "log-cut", text, "", rules.vdi)
    return tail


def _lost(store: Store, kind: str, text: str, name: str, vdi: str) -> None:
    severity = Severity.UNAVAILABLE if store.missing else Severity.DAMAGE
    store.add(severity, kind, text, name=name, vdi=vdi)


def _copy(store: Store, owner: Owner, number: int, zone: int) -> _Copy:
    """As much of a copy as is valid by itself."""
    name = segment_name(owner.log, number)
    try:
        data = store.load(zone, name, SEGMENT_BYTES_MAX) or b""
    except Damaged:
        data = b""
    header = seal = None
    try:
        header = segment_header(data[:PAGE], owner, number)
    except Damaged:
        pass  # reported if the segment turns out to have records
    try:
        seal = directory(data, owner, number, len(data))
    except Damaged:
        pass  # not sealed, which is not damage
    return _Copy(data, header, seal)


def _claim(copy: _Copy, owner: Owner, number: int, generation: int) -> int:
    """The highest durable_upto of any valid record header, wherever it stands."""
    pages = len(copy.data) // PAGE
    words = np.frombuffer(copy.data, U64, pages * (PAGE // 8)).reshape(pages, PAGE // 8)
    highest = 0
    for block in np.flatnonzero(words[:, 0] == _RECORD_MAGIC).tolist():
        try:
            record = record_header(copy.data[block * PAGE : block * PAGE + PAGE], owner, number, block)
        except Damaged:
            continue
        if record.generation == generation:
            highest = max(highest, record.durable_upto)
    return highest


def _kept(tail: Tail, copies: Mapping[int, _Copy], expected: Sequence[int], row: Row | None) -> bool:
    """Whether the segment stays as it is: sealed, and behind what came before.

    A row of the head says which seal it is, and one zone that shows it is enough. Otherwise all holders must agree.
    """
    seals = [copies[zone].seal for zone in expected if zone in copies]
    valid = [seal for seal in seals if seal is not None and (row is None or seal.seal_crc == row.seal_crc)]
    if not valid or (row is None and (len(valid) < len(expected) or len({seal.seal_crc for seal in valid}) > 1)):
        return False
    follows = (tail.position + 1, tail.crc)
    return all((seal.first_position, seal.previous_crc) == follows for seal in valid)


def _records(
    store: Store,
    owner: Owner,
    number: int,
    generation: int,
    where: tuple[Mapping[int, _Copy], Sequence[int]],
    tail: Tail,
    lacks: list[_Lack],
    rules: Rules,
) -> None:
    """Step 3 for one segment."""
    copies, expected = where
    block = 1
    parts = []
    lacking: dict[int, int] = {}
    while True:
        good: Record | None = None
        source = b""
        having = set()
        for zone, copy in copies.items():
            record = _record(copy.data, owner, number, block, generation, tail)
            if record is not None:
                having.add(zone)
                if good is None:
                    good, source = record, copy.data
        if good is None:
            break
        for zone in expected:
            if zone not in having or copies[zone].header is None:
                lacking.setdefault(zone, good.position)
        if rules.on_record is not None:
            rules.on_record(good, memoryview(source)[(block + 1) * PAGE : good.end * PAGE])
        parts.append(good.operations)
        tail.position, tail.crc, block = good.last_position, good.crc, good.end
    if parts:
        tail.segments.append((number, join(parts)))
    name = segment_name(owner.log, number)
    for zone, position in lacking.items():
        sealed = zone in copies and copies[zone].seal is not None
        lacks.append(_Lack(zone, name, position, sealed, zone not in copies))
    store.report.checked["segment copies"] += len(copies)


def _record(data: bytes, owner: Owner, number: int, block: int, generation: int, tail: Tail) -> Record | None:
    """The record at `block` if it is whole and goes on where the log stands."""
    try:
        record = record_header(data[block * PAGE : block * PAGE + PAGE], owner, number, block)
    except Damaged:
        return None
    if (record.generation, record.position, record.previous_crc) != (generation, tail.position + 1, tail.crc):
        return None
    view = memoryview(data)
    for at, crc in enumerate(record.crcs.tolist(), block + 1):
        page = view[at * PAGE : at * PAGE + PAGE]
        if len(page) != PAGE or crc32c(page) != crc:
            return None
    return record


def _report(store: Store, tail: Tail, lack: _Lack, rules: Rules) -> None:
    """A copy without records that it should have, or that it was about to get when the server died."""
    durable = lack.position <= tail.claim or lack.sealed or rules.clean
    text = f"lacks the log from position {lack.position} on, which another zone has"
    if lack.missing:
        text = f"is missing, and another zone has the log from position {lack.position} on in it"
    text += "; the next opening copies it" if durable else ""
    store.add(
        Severity.FAULT if durable else Severity.NOTE,
        "bad-copy" if not lack.missing else "missing-copy",
        text,
        zone=lack.zone,
        name=lack.name,
        vdi=rules.vdi,
    )
