"""Checkpoints: every copy whole, every frame right, and the map that they hold, read region by region."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from objstore.check.layout import (
    FOOTER_BYTES,
    PAGE,
    REGION_BLOCKS,
    ROOT_ENTRY,
    TABLE_ENTRY,
    U64,
    Array64,
    CheckpointHeader,
    Damaged,
    Owner,
    checkpoint_footer,
    checkpoint_header,
    frame,
    map_page,
)
from objstore.check.members import Store, copy_of
from objstore.check.report import Severity

READ_BYTES: Final = 1 << 20
"""Frames that lie together are read together, up to so much."""
GAP_BYTES: Final = 16 << 10
"""Frames with no more than this between them are read together."""
FRAME_BYTES_MAX: Final = 12 + 8 + 8 * REGION_BLOCKS
REGIONS_AT_ONCE: Final = 256
CHECKPOINT_BYTES_MAX: Final = 1 << 36
"""More than one has: 2 GiB of map for each TiB of a VDI, and only what changed of it."""
REGIONS_MAX: Final = 1 << 38
SEGMENTS_MAX: Final = 1 << 28
LIVE: Final = 0
DEAD: Final = 1
KEPT: Final = 2
"""States of a table's row."""

LOG_SHIFT: Final = 40
_REGION_BITS: Final = np.uint64((1 << LOG_SHIFT) - 1)

RootTable = NDArray[Any]
Holders = Mapping[tuple[int, int], Sequence[int]]


class Frozen(NamedTuple):
    """The map of a snapshot, for the clones of it. root: with the log in every entry. logs: its own log and those that
    it descends from. lost: addresses of blocks whose data no copy has, rising."""

    log: int
    root: RootTable
    holders: Holders
    logs: frozenset[int]
    lost: Array64


def checkpoint_name(log: int, number: int) -> str:
    return f"checkpoint/{log:06x}/{number:08x}"


class Whole(NamedTuple):
    """What one copy says, frames apart. header_page, footer: its bytes, to compare copies by."""

    header: CheckpointHeader
    root: RootTable
    table: RootTable
    root_offset: int
    header_page: bytes
    footer: bytes


@dataclass
class Checkpoint:
    """A checkpoint that at least one zone has whole (header, footer, root, table).

    zones: indexes of those that have it; good: of those whose frames are right too. differ: of those that have another
    one, whole as well: which is right can't be told.
    """

    number: int
    whole: Whole
    zones: list[int] = field(default_factory=list)
    good: list[int] = field(default_factory=list)
    differ: set[int] = field(default_factory=set)

    @property
    def header(self) -> CheckpointHeader:
        return self.whole.header

    @property
    def root(self) -> RootTable:
        return self.whole.root

    @property
    def table(self) -> RootTable:
        return self.whole.table


def read_whole(store: Store, zone: int, owner: Owner, number: int) -> Whole:
    """Header, footer, root and table of one copy."""
    reader, name = store.zones[zone], checkpoint_name(owner.log, number)
    try:
        size = reader.size(name)
        if size is None or size < PAGE + FOOTER_BYTES:
            raise Damaged("is cut short")
        page = reader.read(name, 0, PAGE)
        last = reader.read(name, size - FOOTER_BYTES, FOOTER_BYTES)
        header = checkpoint_header(page, owner, number)
        footer = checkpoint_footer(last, owner, number, size)
        root = reader.read(name, footer.root_offset, footer.root_count * ROOT_ENTRY.itemsize)
        table = reader.read(name, footer.table_offset, footer.table_count * TABLE_ENTRY.itemsize)
    except OSError as error:
        raise Damaged(f"cannot be read: {error.strerror or error}") from error
    if crc32c(root) != footer.root_crc:
        raise Damaged("the root has a wrong checksum")
    if crc32c(table) != footer.table_crc:
        raise Damaged("the segment table has a wrong checksum")
    entries, rows = np.frombuffer(root, ROOT_ENTRY), np.frombuffer(table, TABLE_ENTRY)
    if len(np.unique(regions_of(entries))) != len(entries) or (entries["checkpoint"][own(entries)] > number).any():
        raise Damaged("the root names a region twice, or a later checkpoint")
    if (entries["length"] > FRAME_BYTES_MAX).any() or (entries["offset"] > CHECKPOINT_BYTES_MAX).any():
        raise Damaged("the root names a frame longer than any, or behind the end of any checkpoint")
    if (regions_of(entries) >= REGIONS_MAX).any() or header.next_segment > SEGMENTS_MAX:
        raise Damaged("there are no such regions or segments")
    if len(np.unique(rows["number"])) != len(rows) or (rows["number"] >= header.next_segment).any():
        raise Damaged("the segment table names a segment twice, or one of the tail")
    if (rows["state"] > KEPT).any():
        raise Damaged("the segment table has an unknown state")
    return Whole(header, entries, rows, footer.root_offset, page, last)


def read_checkpoints(
    store: Store, owner: Owner, holders: Mapping[int, Sequence[int]]
) -> tuple[dict[int, Checkpoint], dict[tuple[int, int], str]]:
    """All checkpoints of a log, and what is wrong with copies: (number, zone) -> text.

    holders: zones that list each.
    """
    found: dict[int, Checkpoint] = {}
    problems: dict[tuple[int, int], str] = {}
    for number, zones in holders.items():
        for zone in zones:
            try:
                whole = read_whole(store, zone, owner, number)
            except Damaged as error:
                problems[number, zone] = str(error)
                continue
            known = found.setdefault(number, Checkpoint(number, whole))
            if (known.whole.footer, known.whole.header_page) != (whole.footer, whole.header_page):
                problems[number, zone] = f"differs from the copy in {store.zones[known.zones[0]].label}"
                known.differ.add(zone)
                continue
            known.zones.append(zone)
    return found, problems


def regions_of(root: RootTable) -> Array64:
    """The regions of a root's entries."""
    regions: Array64 = root["region"] & _REGION_BITS
    return regions


def own(root: RootTable) -> NDArray[np.bool_]:
    """Which entries of a root name pages of the checkpoint's own log."""
    return np.asarray(root["region"] <= _REGION_BITS)


def in_log(root: RootTable, log: int) -> RootTable:
    """The same entries with the log in all of them, for who comes from another log."""
    named = root.copy()
    named["region"][own(root)] |= np.uint64(log << LOG_SHIFT)
    return named


def verify_frames(
    store: Store, owner: Owner, number: int, entries: RootTable, zones: Sequence[int], logs: Collection[int]
) -> dict[int, str]:
    """Frames of one checkpoint on every one of these zones; what is wrong, by zone. logs: see map_page."""
    problems: dict[int, str] = {}
    name = checkpoint_name(owner.log, number)
    for zone in zones:
        bad = 0
        for region, data in _frames(store, zone, name, entries):
            try:
                map_page(frame(data, owner, number, region), logs)
            except Damaged as error:
                bad += 1
                problems.setdefault(zone, str(error))
        if bad > 1:
            problems[zone] += f"; {bad} bad frames in all"
        with suppress(OSError):
            store.advance(store.zones[zone].size(name) or 0)
        store.report.checked["checkpoint copies"] += 1
    return problems


def _frames(store: Store, zone: int, name: str, entries: RootTable) -> Iterator[tuple[int, bytes]]:
    """(region, bytes) of each entry of one object; b"" where the zone can't tell."""
    entries = entries[np.argsort(entries["offset"], kind="stable")]
    offsets, lengths = entries["offset"].tolist(), entries["length"].tolist()
    regions = regions_of(entries).tolist()
    first = 0
    while first < len(regions):
        start, last = offsets[first], first
        end = start + lengths[first]
        while (
            last + 1 < len(regions)
            and offsets[last + 1] - end <= GAP_BYTES
            and offsets[last + 1] + lengths[last + 1] - start <= READ_BYTES
        ):
            last += 1
            end = max(end, offsets[last] + lengths[last])
        try:
            data = store.zones[zone].read(name, start, end - start)
        except OSError:
            data = b""
        for at in range(first, last + 1):
            yield regions[at], data[offsets[at] - start : offsets[at] - start + lengths[at]]
        first = last + 1


def report_copies(
    store: Store,
    owner: Owner,
    found: Mapping[int, Checkpoint],
    problems: Mapping[tuple[int, int], str],
    vdi: str,
) -> None:
    """Bad copies of checkpoints as findings, with a repair where one copy is whole."""
    for (number, zone), problem in problems.items():
        name = checkpoint_name(owner.log, number)
        whole = found.get(number)
        source = next(iter(whole.good), None) if whole is not None and not whole.differ else None
        repair = None if source is None else copy_of(store, source, zone, name, CHECKPOINT_BYTES_MAX)
        store.add(Severity.FAULT, "bad-copy", problem, zone=zone, name=name, vdi=vdi, repair=repair)


class MapReader:
    """The map of one checkpoint. lost: regions whose page no zone has, as reading finds them."""

    def __init__(
        self, store: Store, owner: Owner, root: RootTable, holders: Holders, logs: Collection[int] | None = None
    ) -> None:
        """holders: for each log and checkpoint that the root names, the zones to read it from, the best first. logs:
        those that the map may name, default the owner's."""
        self._store = store
        self._owner = owner
        self._holders = holders
        self._logs = {owner.log} if logs is None else logs
        self.root = root
        self.lost: dict[int, str] = {}

    def pages(self, wanted: Array64 | None = None) -> Iterator[tuple[Array64, Array64]]:
        """(regions, entries of shape (regions, 1024)), some at a time, of these regions (sorted) or all that have a
        page, in no order. A lost region is left out."""
        root = in_log(self.root, self._owner.log)
        if wanted is not None:
            root = root[np.isin(regions_of(root), wanted)]
        regions: list[int] = []
        pages: list[Array64] = []
        keys = (root["region"] >> np.uint64(LOG_SHIFT) << np.uint64(32)) | root["checkpoint"]
        for key in np.unique(keys).tolist():
            entries = root[keys == key]
            owner, number = Owner(self._owner.store, key >> 32), key & 0xFFFFFFFF
            name = checkpoint_name(owner.log, number)
            zones = self._holders.get((owner.log, number), ())
            if not len(zones):
                for region in regions_of(entries).tolist():
                    self.lost[region] = f"checkpoint {number} of log {owner.log} is in no zone"
                continue
            for region, data in _frames(self._store, zones[0], name, entries):
                page = self._page(owner, number, region, data, entries, zones[1:], name)
                if page is None:
                    continue
                regions.append(region)
                pages.append(page)
                if len(regions) == REGIONS_AT_ONCE:
                    yield np.array(regions, U64), np.stack(pages)
                    regions.clear()
                    pages.clear()
        if regions:
            yield np.array(regions, U64), np.stack(pages)

    def _page(
        self,
        owner: Owner,
        number: int,
        region: int,
        data: bytes,
        entries: RootTable,
        others: Sequence[int],
        name: str,
    ) -> Array64 | None:
        try:
            return map_page(frame(data, owner, number, region), self._logs)
        except Damaged as error:
            problem = str(error)
        entry = entries[regions_of(entries) == region]
        for zone in others:
            for _, copy in _frames(self._store, zone, name, entry):
                try:
                    return map_page(frame(copy, owner, number, region), self._logs)
                except Damaged:
                    continue
        self.lost[region] = problem
        return None


def dense(reader: MapReader, regions: Array64) -> Array64:
    """Entries of these regions (sorted), shape (regions, 1024); holes where there is no page."""
    entries = np.zeros((len(regions), REGION_BLOCKS), U64)
    for found, pages in reader.pages(regions):
        entries[np.searchsorted(regions, found)] = pages
    return entries
