"""One VDI's log as a whole: checkpoints, segments, map, tail, and that they tell the same story."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np

from objstore.check.catalog import Head, Snapshot, Vdi, counts, listing
from objstore.check.checkpoints import (
    CHECKPOINT_BYTES_MAX,
    DEAD,
    LIVE,
    Checkpoint,
    Frozen,
    Holders,
    MapReader,
    RootTable,
    checkpoint_name,
    dense,
    in_log,
    own,
    read_checkpoints,
    regions_of,
    report_copies,
    verify_frames,
)
from objstore.check.epochs import Line
from objstore.check.layout import (
    PAGE,
    ROOT_ENTRY,
    U64,
    Array64,
    Damaged,
    Directory,
    Operations,
    Owner,
    SegmentHeader,
    record_header,
    segment_header,
)
from objstore.check.mapcheck import BATCH_SEGMENTS, MapCheck, first_behind, owners, runs, wrong_counters
from objstore.check.members import Store, copy_of
from objstore.check.replay import WINDOW_REGIONS, apply, effects, touched
from objstore.check.report import Repair, Severity
from objstore.check.segments import Verified, check_sealed, read_directory, segment_name
from objstore.check.tail import Rules, Tail, read_tail

RANGES_MAX: Final = 1000
"""Ranges of lost data that one finding names."""


def check_log(
    store: Store,
    line: Line,
    vdi: Vdi,
    head: Head | None,
    snapshots: Sequence[Snapshot] = (),
    base: Frozen | None = None,
) -> dict[int, Frozen]:
    """Check the log of a VDI and report what is wrong with it. line: the epochs. snapshots: whose maps are in it; base:
    the one that the VDI is a clone of. The answer: the maps of its own snapshots, by checkpoint."""
    check = _LogCheck(store, line, vdi, head, snapshots, base)
    check.run()
    return check.result


@dataclass
class _LogCheck:
    store: Store
    line: Line
    vdi: Vdi
    head: Head | None
    snapshots: Sequence[Snapshot] = ()
    base: Frozen | None = None
    chosen: Checkpoint | None = None
    before: Checkpoint | None = None
    frozen: dict[int, Snapshot] = field(default_factory=dict)
    """Snapshots whose maps are there, by the numbers of their checkpoints."""
    readable: dict[int, int] = field(default_factory=dict)
    """Zone to read the directory of a segment from."""

    result: dict[int, Frozen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        store, log = self.store, self.vdi.log
        self.logs = frozenset({log}) | (self.base.logs if self.base is not None else frozenset())
        self.owner = Owner(store.id, log)
        self.segments = listing(store, f"log/{log:06x}", 7)
        self.checkpoints = listing(store, f"checkpoint/{log:06x}", 8)

    def run(self) -> None:
        if self.head is None:
            self._leftover(self.segments, self.checkpoints, "belongs to an opening that was never committed")
            for snapshot in self.snapshots:
                self._add(Severity.DAMAGE, "snapshot", f"snapshot {snapshot.name} is in a log that was never opened")
            return
        before = self.store.report.counts[Severity.DAMAGE], self.store.report.counts[Severity.UNAVAILABLE]
        if not self._choose():
            return
        frozen = self._find_snapshots()
        self._check_frames()
        table = self._check_table()
        tail = self._check_tail()
        self._check_lost(table, tail)
        self._check_behind(tail)
        for snapshot in self.snapshots:
            if snapshot.checkpoint not in frozen and tail.position < snapshot.position:
                text = f"the map of snapshot {snapshot.name} is in no zone, and the log ends before it"
                self._add(self._grave, "snapshot", text)
        self._check_replay()
        after = self.store.report.counts[Severity.DAMAGE], self.store.report.counts[Severity.UNAVAILABLE]
        self._report_leftover(removable=before == after and not self.store.missing)

    def _add(self, severity: Severity, kind: str, text: str, name: str = "") -> None:
        self.store.add(severity, kind, text, name=name, vdi=self.vdi.name)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _choose(self) -> bool:
        """Find the checkpoint that an opening would start from, and the one before it. False: there is none."""
        assert self.head is not None
        for number in [n for n in self.checkpoints if self.head.base_checkpoint < n < self.head.first_checkpoint]:
            self._leftover({}, {number: self.checkpoints.pop(number)}, "is of a run that ended before the head's")
        self.found, self.problems = read_checkpoints(self.store, self.owner, self.checkpoints)
        for number in set(self.checkpoints) - set(self.found):
            self._add(Severity.FAULT, "checkpoint", "no zone has it whole", checkpoint_name(self.owner.log, number))
        if not self.found:
            if self.head.checkpoint or self.checkpoints:
                self._add(self._grave, "checkpoint", "no checkpoint can be read")
                return False
            return True
        numbers = sorted(self.found)
        self.chosen = self.found[numbers[-1]]
        if self.chosen.number < self.head.checkpoint:
            between = [n for n in self.checkpoints if self.chosen.number < n < self.head.checkpoint]
            text = f"checkpoint {self.head.checkpoint}, which the head names, can't be read"
            if between:
                self._add(self._grave, "checkpoint", f"{text}, nor can the one before it")
                return False
            name = checkpoint_name(self.owner.log, self.head.checkpoint)
            self._add(Severity.FAULT, "checkpoint", f"{text}; the one before it, {self.chosen.number}, serves", name)
        if self.chosen.number == max(self.checkpoints):
            self._choose_before(numbers)
        return True

    def _choose_before(self, numbers: list[int]) -> None:
        """The one to fall back on. A checkpoint that serves as fallback has none: what it needed may be freed."""
        assert self.chosen is not None
        expected = self.chosen.header.previous_next_segment
        if len(numbers) > 1 and self.found[numbers[-2]].header.next_segment == expected:
            self.before = self.found[numbers[-2]]
        elif expected:
            text = f"the checkpoint before {self.chosen.number} can't be read: nothing is left to fall back on"
            self._add(Severity.FAULT, "checkpoint", text)

    def _find_snapshots(self) -> dict[int, Snapshot]:
        """The snapshots whose maps are there, by checkpoint. Only the newest can be still to be made from the log."""
        newest = 0 if self.chosen is None else self.chosen.number
        for snapshot in self.snapshots:
            checkpoint = self.found.get(snapshot.checkpoint)
            if checkpoint is None:
                if snapshot.checkpoint <= newest or snapshot is not self.snapshots[-1]:
                    text = f"the map of snapshot {snapshot.name} can't be read"
                    self._add(self._grave, "snapshot", text, checkpoint_name(self.owner.log, snapshot.checkpoint))
                continue
            if checkpoint.header.position != snapshot.position:
                text = f"is at position {checkpoint.header.position}, its snapshot {snapshot.name} at another"
                self._add(Severity.DAMAGE, "snapshot", text, checkpoint_name(self.owner.log, snapshot.checkpoint))
            self.frozen[snapshot.checkpoint] = snapshot
        return self.frozen

    @property
    def _grave(self) -> Severity:
        return Severity.UNAVAILABLE if self.store.missing else Severity.DAMAGE

    @property
    def _roots(self) -> list[RootTable]:
        checkpoints = [checkpoint for checkpoint in (self.chosen, self.before) if checkpoint is not None]
        return [checkpoint.root for checkpoint in [*checkpoints, *(self.found[n] for n in self.frozen)]]

    def _check_frames(self) -> None:
        """Every frame of every checkpoint, on every copy; copies that are missing."""
        named = np.concatenate([np.zeros(0, ROOT_ENTRY), *self._roots])
        self._check_foreign(named[~own(named)])
        named = named[own(named)]
        self.holders: dict[int, list[int]] = {}
        for number, checkpoint in self.found.items():
            ours = checkpoint.root[own(checkpoint.root) & (checkpoint.root["checkpoint"] == number)]
            entries = np.unique(np.concatenate((ours, named[named["checkpoint"] == number])))
            bad = verify_frames(self.store, self.owner, number, entries, checkpoint.zones, self.logs)
            self.problems.update({(number, zone): text for zone, text in bad.items()})
            checkpoint.good = [zone for zone in checkpoint.zones if zone not in bad]
            self.holders[number] = [*checkpoint.good, *bad]
        for number, zones in self.checkpoints.items():  # a bad root does not make the frames bad
            self.holders.setdefault(number, list(zones))
        report_copies(self.store, self.owner, self.found, self.problems, self.vdi.name)
        self.needed = set(np.unique(named["checkpoint"]).tolist())
        self.needed |= {checkpoint.number for checkpoint in (self.chosen, self.before) if checkpoint is not None}
        self.needed |= self.frozen.keys()
        self._count_copies()

    def _check_foreign(self, entries: RootTable) -> None:
        """A clone shares pages of other logs with the snapshot that it is of, and with nobody else."""
        theirs = np.zeros(0, U64) if self.base is None else regions_of(self.base.root)
        strange = entries[~np.isin(regions_of(entries), theirs)]
        if len(strange) and (self.base is not None or not self.vdi.base):
            text = f"a map has {len(strange)} pages of other logs that are none of the snapshot that it is a clone of"
            self._add(Severity.DAMAGE, "map", text)

    def _count_copies(self) -> None:
        """Checkpoints that some zone should have and doesn't, as far as that shows: where the log's others lie."""
        assert self.head is not None
        wanted = min(self.vdi.copies, len(self.store.placing))
        places = sorted({zone for zones in self.checkpoints.values() for zone in zones} & self.store.serving)
        for number in sorted(self.needed):
            name = checkpoint_name(self.owner.log, number)
            having = self.checkpoints.get(number, [])
            if not having:
                self._add(self._grave, "checkpoint", "is in no zone, and its map pages are needed", name)
                continue
            short = wanted - len(having) - len(self.store.missing)
            good = self.found[number].good if number in self.found else []
            for zone in [zone for zone in places if zone not in having][: max(0, short)]:
                repair = copy_of(self.store, good[0], zone, name, CHECKPOINT_BYTES_MAX) if good else None
                new = number > self.head.checkpoint
                text = "is missing" + ("; the next opening copies it here" if new else "")
                severity = Severity.NOTE if new else Severity.FAULT
                self.store.add(severity, "missing-copy", text, zone=zone, name=name, vdi=self.vdi.name, repair=repair)
                short -= 1
            if short > 0 and number <= self.head.checkpoint:
                self._add(Severity.FAULT, "few-copies", f"has {len(having)} copies of {wanted}", name)

    # -- segments below the tail ----------------------------------------------------------------------------------

    def _check_table(self) -> MapCheck | None:
        """Segments of the table, and the maps of both checkpoints against them."""
        if self.chosen is None:
            return None
        checkpoint = self.chosen
        rows = checkpoint.table[np.argsort(checkpoint.table["number"])]
        newest = self._map_check(checkpoint.root, rows)
        checks = [newest]
        needed: set[int] = set()
        if self.before is not None:
            self._check_before(self.before, checkpoint)
            needed = set(self.before.table["number"][self.before.table["state"] == 0].tolist())
            everything = np.concatenate((rows, self.before.table[self.before.table["state"] == 0]))
            _, unique = np.unique(everything["number"], return_index=True)
            checks.append(self._map_check(self.before.root, everything[unique]))
        maps = {number: self._map_check(self.found[number].root, rows) for number in self.frozen}
        for number in self.frozen:
            self._check_kept(self.found[number], rows)
        for start in range(0, max(1, len(rows)), BATCH_SEGMENTS):
            batch: dict[int, Array64 | None] = {}
            lost: dict[int, list[int]] = {}
            for row in rows[start : start + BATCH_SEGMENTS]:
                verified = self._check_row(row, needed=int(row["number"]) in needed or row["state"] != DEAD)
                table = verified.directory
                batch[verified.number] = None if table is None else owners(table)
                if verified.lost:
                    lost[verified.number] = verified.lost
                if verified.good:
                    self.readable[verified.number] = verified.good[0]
            for check in [*checks, *maps.values()]:
                check.run(batch, lost, first=start == 0)
        self._report_maps(checks, rows)
        for number, check in maps.items():
            self._report_snapshot(self.frozen[number], check)
        return newest

    def _check_kept(self, frozen: Checkpoint, rows: RootTable) -> None:
        """Whether the newest table has every segment that the map of a snapshot may point into."""
        needed = frozen.table["number"][frozen.table["state"] == LIVE]
        gone = np.setdiff1d(needed, rows["number"][rows["state"] != DEAD])
        if len(gone):
            text = f"snapshot {self.frozen[frozen.number].name} needs it, and the newest checkpoint does not keep it"
            self._add(Severity.DAMAGE, "snapshot", text, segment_name(self.owner.log, int(gone[0])))

    def _report_snapshot(self, snapshot: Snapshot, check: MapCheck) -> None:
        """What is wrong with the map of a snapshot; what it points at never changes any more."""
        if check.wrong.count:
            text = f"the map of snapshot {snapshot.name} has {check.wrong.count} wrong entries: {check.wrong.first}"
            self._add(Severity.DAMAGE, "map", text)
        for region, problem in sorted(check.reader.lost.items())[:RANGES_MAX]:
            where = f"blocks {region * 1024} to {region * 1024 + 1023}"
            text = f"the map of snapshot {snapshot.name} can't be read for {where}: {problem}"
            self.store.add(self._grave, "map", text, vdi=snapshot.name, ranges=((region * 1024, 1024),))
        if check.lost_count:
            ranges = runs(np.sort(np.concatenate([blocks for blocks, _ in check.lost])).tolist())
            text = f"{check.lost_count} blocks of data are in no copy that is here, the first at block {ranges[0][0]}"
            severity = Severity.UNAVAILABLE if self.unavailable else Severity.DAMAGE
            self.store.add(severity, "data-lost", text, vdi=snapshot.name, ranges=ranges[:RANGES_MAX])
        self.store.report.checked["snapshots"] += 1
        root = in_log(check.reader.root, self.owner.log)
        lost = np.sort(np.concatenate([np.zeros(0, U64), *(entries for _, entries in check.lost)]))
        self.result[snapshot.checkpoint] = Frozen(self.owner.log, root, self._all_holders, self.logs, lost)

    @property
    def _all_holders(self) -> Holders:
        ours = {(self.owner.log, number): zones for number, zones in self.holders.items()}
        return {**ours, **(self.base.holders if self.base is not None else {})}

    def _reader(self, root: RootTable) -> MapReader:
        if self.base is not None:
            shared = root[~own(root)]
            theirs = self.base.root[np.isin(regions_of(self.base.root), regions_of(shared))]
            root = np.concatenate((root[own(root)], theirs))
        return MapReader(self.store, self.owner, root, self._all_holders, self.logs)

    def _map_check(self, root: RootTable, rows: RootTable) -> MapCheck:
        if self.base is None:
            return MapCheck(self._reader(root), rows, self.owner.log)
        base = MapReader(self.store, self.owner, self.base.root, self._all_holders, self.logs)
        return MapCheck(self._reader(root), rows, self.owner.log, base, self.base.lost)

    def _check_before(self, before: Checkpoint, newest: Checkpoint) -> None:
        needed = before.table["number"][before.table["state"] == 0]
        gone = np.setdiff1d(needed, newest.table["number"])
        if len(gone):
            text = f"the checkpoint before needs it, and checkpoint {newest.number} does not list it"
            self._add(Severity.FAULT, "checkpoint", text, segment_name(self.owner.log, int(gone[0])))

    def _check_row(self, row: np.void, *, needed: bool) -> Verified:
        """One segment of the table on all its zones. needed: by a map; what is dead in both may just be going."""
        number, mask = int(row["number"]), int(row["zones"])
        here, absent = self.store.by_mask(mask)
        if not needed:
            here = [zone for zone in here if zone in self.segments.get(number, ())]
        name = segment_name(self.owner.log, number)
        verified = check_sealed(
            self.store,
            self.owner,
            number,
            here,
            seal_crc=int(row["seal_crc"]),
            vdi=self.vdi.name,
            repairable=True,
        )
        for zone in set(self.segments.get(number, ())) - set(self.store.by_mask(mask)[0]):
            text = "is a copy too many: the checkpoint's table does not name this zone"
            self.store.add(Severity.NOTE, "extra-copy", text, zone=zone, name=name, vdi=self.vdi.name)
        if absent:
            self.store.report.checked["copies on missing zones"] += len(absent)
        table = verified.directory
        if table is not None and (table.generation & 0xFFFFFFFF, verified.blocks) != (row["generation"], row["blocks"]):
            text = f"generation {table.generation}, {verified.blocks} blocks: the checkpoint's table says otherwise"
            self._add(Severity.DAMAGE, "table", text, name)
        wanted = min(self.vdi.copies, len(self.store.placing))
        copies = sum(mask >> member & 1 for member in self.store.members)
        if copies < wanted:
            self._add(Severity.FAULT, "few-copies", f"has {copies} copies of {wanted}", name)
        if verified.lost or table is None:
            self.unavailable |= bool(absent)
        return verified

    unavailable: bool = False
    """Whether a missing zone may have what is lost here."""

    def _report_maps(self, checks: list[MapCheck], rows: RootTable) -> None:
        for check, severity in zip(checks, (Severity.DAMAGE, Severity.FAULT), strict=False):
            which = "the map" if severity is Severity.DAMAGE else "the map of the checkpoint before"
            if check.wrong.count:
                text = f"{which} has {check.wrong.count} wrong entries: {check.wrong.first}"
                self._add(severity, "map", text)
            for region, problem in sorted(check.reader.lost.items())[:RANGES_MAX]:
                severity = self._grave if severity is Severity.DAMAGE else severity
                text = f"{which} can't be read for blocks {region * 1024} to {region * 1024 + 1023}: {problem}"
                self.store.add(severity, "map", text, vdi=self.vdi.name, ranges=((region * 1024, 1024),))
        live = checks[0].live
        for row, count in zip(rows[wrong_counters(checks[0])], live[wrong_counters(checks[0])], strict=True):
            text = f"the table says that {row['live']} blocks live, and the map has {count}"
            self._add(Severity.FAULT, "counter", text, segment_name(self.owner.log, int(row["number"])))
        for row in rows[(rows["state"] != LIVE) & (live > 0)]:
            text = "is listed as dead, and the map points into it"
            self._add(Severity.DAMAGE, "map", text, segment_name(self.owner.log, int(row["number"])))

    # -- the tail -------------------------------------------------------------------------------------------------

    def _check_tail(self) -> Tail:
        assert self.head is not None
        header = None if self.chosen is None else self.chosen.header
        self.next_segment = 0 if header is None else header.next_segment
        start = (0, 0) if header is None else (header.position, header.previous_crc)
        rows = {row.number: row for row in self.head.tail if row.number >= self.next_segment}
        self.counting = set(rows)
        if not self.head.clean:
            self._check_end_known(self.head)
            first = max(self.head.first_number, self.next_segment)
            self.counting |= {
                number
                for number, zones in self.segments.items()
                if number >= first and counts(self.store, self.line, self.owner, number, zones, self.head.generation)
            }
        rules = Rules(self._holders, rows, self.vdi.name, clean=self.head.clean)
        return read_tail(self.store, self.owner, self.segments, sorted(self.counting), start, rules)

    def _holders(self, header: SegmentHeader) -> list[int]:
        return self.store.by_ids(self.line.holders(header.zones, header.epoch_id))

    def _check_end_known(self, head: Head) -> None:
        """Whether the log may go on in zones that are not here."""
        gone = self.line.unknown_end(head.epoch, head.copies)
        if gone:
            known = {zone.id: zone.path for zone in (*self.line.newest.members, *self.line.newest.out)}
            names = ", ".join(known.get(zone, zone.hex()[:8]) for zone in gone)
            self._add(Severity.UNAVAILABLE, "log-end", f"the log may go on in zones that are not here: {names}")

    def _check_lost(self, check: MapCheck | None, tail: Tail) -> None:
        """Which blocks of the VDI have lost their data: those that the map, log's end included, still looks for."""
        blocks = [np.zeros(0, U64)]
        entries = [np.zeros(0, U64)]
        if check is None and self.base is not None and len(self.base.lost):
            for regions, pages in self._reader(self.base.root).pages():
                rows, columns = np.nonzero(np.isin(pages, self.base.lost))
                blocks.append(regions[rows] * np.uint64(1024) + columns.astype(U64))
                entries.append(pages[rows, columns])
        if check is not None:
            blocks += [found for found, _ in check.lost]
            entries += [found for _, found in check.lost]
        for verified in tail.sealed:
            if verified.lost and verified.directory is not None:
                owned = owners(verified.directory)[verified.lost]
                address = self.owner.log << 40 | verified.number << 12
                places = np.array(verified.lost, U64) | np.uint64(address)
                blocks.append(owned[owned < 1 << 48])
                entries.append(places[owned < 1 << 48])
        wanted, sought = np.concatenate(blocks), np.concatenate(entries)
        if not len(wanted):
            return
        lost = np.sort(wanted[self._now(wanted, tail) == sought])
        hidden = 0 if check is None else check.lost_count - sum(len(found) for found, _ in check.lost)
        if len(lost) or hidden:
            ranges = runs(lost.tolist())
            text = f"{len(lost) + hidden} blocks of data are in no copy that is here"
            text += f", the first at block {ranges[0][0]}" if ranges else ""
            severity = Severity.UNAVAILABLE if self.unavailable else Severity.DAMAGE
            self.store.add(severity, "data-lost", text, vdi=self.vdi.name, ranges=ranges[:RANGES_MAX])

    def _check_behind(self, tail: Tail) -> None:
        """Whether the map, log's end included, has anything behind the end of the VDI."""
        limit = self.vdi.blocks_max
        root = self._beginning if self.chosen is None else self.chosen.root
        regions, _ = touched(self.owner.log, tail.segments, np.unique(regions_of(root)))
        block = first_behind(limit, regions, lambda some: self._end_of(some, tail))
        if block is not None:
            self._add(Severity.DAMAGE, "map", f"the map has block {block}, behind the end of a VDI of {limit} blocks")

    def _end_of(self, regions: Array64, tail: Tail) -> Array64:
        """The map's entries of whole regions at the end of the log."""
        window = self._dense(self.chosen, regions)
        apply(regions, window, effects(self.owner.log, tail.segments))
        return window

    def _now(self, blocks: Array64, tail: Tail) -> Array64:
        """The map's entries of these blocks at the end of the log."""
        result = np.zeros(len(blocks), U64)
        everything = np.unique(blocks >> np.uint64(10))
        for start in range(0, len(everything), WINDOW_REGIONS):
            regions = everything[start : start + WINDOW_REGIONS]
            window = self._end_of(regions, tail)
            at = np.minimum(np.searchsorted(regions, blocks >> np.uint64(10)), len(regions) - 1)
            inside = regions[at] == blocks >> np.uint64(10)
            result[inside] = window[at[inside], (blocks[inside] & np.uint64(1023)).astype(np.int64)]
        return result

    def _dense(self, checkpoint: Checkpoint | None, regions: Array64) -> Array64:
        root = self._beginning if checkpoint is None else checkpoint.root
        return dense(self._reader(root), regions)

    @property
    def _beginning(self) -> RootTable:
        """The root of the map before the first operation."""
        return np.zeros(0, ROOT_ENTRY) if self.base is None else self.base.root

    # -- checkpoints against the log between them ------------------------------------------------------------------

    def _check_replay(self) -> None:
        """Each checkpoint and the operations behind it give the next one, as far as both are still there."""
        newest = self.chosen
        if newest is None:
            return
        numbers = sorted(self.found)
        pairs = [(self.found[older], self.found[newer]) for older, newer in pairwise(numbers)]
        story: list[tuple[Checkpoint | None, Checkpoint]] = [
            (older, newer) for older, newer in pairs if older.header.next_segment == newer.header.previous_next_segment
        ]
        if len(numbers) == 1 and not newest.header.previous_next_segment:
            story.append((None, newest))
        for older, newer in story:
            behind = 0 if older is None else older.header.next_segment
            between = [number for number in np.sort(newer.table["number"]).tolist() if number >= behind]
            if all(number in self.readable for number in between) and self._check_chain(older, newer, between):
                self._check_pair(older, newer, between)

    def _check_chain(self, older: Checkpoint | None, newer: Checkpoint, numbers: list[int]) -> bool:
        """Whether the segments between two checkpoints have the log between them, and nothing else."""
        at = (0, 0) if older is None else (older.header.position, older.header.previous_crc)
        for number in numbers:
            table = self._directory(number)
            if (table.first_position - 1, table.previous_crc) != at:
                text = f"does not continue the log behind position {at[0]}"
                self._add(Severity.DAMAGE, "chain", text, segment_name(self.owner.log, number))
                return False
            at = (table.last_position, table.last_crc)
        if at != (newer.header.position, newer.header.previous_crc):
            text = f"is at position {newer.header.position}, and the segments below it end at {at[0]}"
            self._add(Severity.DAMAGE, "chain", text, checkpoint_name(self.owner.log, newer.number))
            return False
        return True

    def _check_pair(self, older: Checkpoint | None, newer: Checkpoint, numbers: list[int]) -> None:
        log = self.owner.log
        before = self._beginning if older is None else older.root
        base = np.union1d(regions_of(before), regions_of(newer.root))
        regions, changed = touched(log, self._operations(numbers), base)
        changed |= _row_of(before, regions) != _row_of(newer.root, regions)
        regions = regions[changed]
        wrong, first = 0, ""
        for start in range(0, len(regions), WINDOW_REGIONS):
            window = regions[start : start + WINDOW_REGIONS]
            old, new = self._reader(before), self._reader(newer.root)
            replayed, expected = dense(old, window), dense(new, window)
            apply(window, replayed, effects(log, self._operations(numbers)))
            unknown = np.isin(window, np.array([*old.lost, *new.lost], U64))
            different = (replayed != expected) & ~unknown[:, np.newaxis]
            if different.any() and not wrong:
                row, column = np.argwhere(different)[0].tolist()
                first = f"block {int(window[row]) * 1024 + column} is {replayed[row, column]:#x} by the log"
                first += f" and {expected[row, column]:#x} in the map"
            wrong += int(different.sum())
        self.store.report.checked["regions replayed"] += len(regions)
        if wrong:
            text = f"is not what the checkpoint before and the log give, in {wrong} blocks: {first}"
            self._add(Severity.DAMAGE, "replay", text, checkpoint_name(log, newer.number))

    def _directory(self, number: int) -> Directory:
        return read_directory(self.store, self.readable[number], self.owner, number)

    def _operations(self, numbers: list[int]) -> Iterator[tuple[int, Operations]]:
        for number in numbers:
            yield number, self._directory(number).operations

    # -- what nobody needs ----------------------------------------------------------------------------------------

    def _report_leftover(self, *, removable: bool) -> None:
        listed = set() if self.chosen is None else set(self.chosen.table["number"].tolist())
        if self.before is not None:
            listed |= set(self.before.table["number"][self.before.table["state"] == 0].tolist())
        segments = {
            number: zones
            for number, zones in self.segments.items()
            if number not in (listed if number < self.next_segment else self.counting)
        }
        for number in [number for number in segments if number >= self.next_segment]:
            if self._has_hidden_records(number, segments[number]):
                name = segment_name(self.owner.log, number)
                self._add(Severity.FAULT, "header", "has records, and its header is damaged in every zone", name)
                del segments[number]
        newest = max(self.checkpoints, default=0)
        checkpoints = {
            number: zones
            for number, zones in self.checkpoints.items()
            if number not in self.needed and number in self.found
        }
        removable &= self.chosen is None or self.chosen.number == newest
        self._leftover(segments, checkpoints, "is left over: neither head nor checkpoint names it", removable)

    def _has_hidden_records(self, number: int, zones: list[int]) -> bool:
        """Whether nobody can say whose segment it is although something was written to it."""
        written = False
        for zone in zones:
            try:
                pages = self.store.zones[zone].read(segment_name(self.owner.log, number), 0, 2 * PAGE)
            except OSError:
                continue
            with suppress(Damaged):
                segment_header(pages[:PAGE], self.owner, number)
                return False
            with suppress(Damaged):
                record_header(pages[PAGE:], self.owner, number, 1)
                written = True
        return written

    def _leftover(
        self,
        segments: Mapping[int, list[int]],
        checkpoints: Mapping[int, list[int]],
        text: str,
        removable: bool = True,
    ) -> None:
        names = [(segment_name(self.owner.log, number), zones) for number, zones in segments.items()]
        names += [(checkpoint_name(self.owner.log, number), zones) for number, zones in checkpoints.items()]
        removable &= not self.store.missing
        for name, zones in names:
            for zone in zones:
                repair = Repair(zone, name) if removable else None
                self.store.add(Severity.NOTE, "orphan", text, zone=zone, name=name, vdi=self.vdi.name, repair=repair)


def _row_of(root: RootTable, regions: Array64) -> RootTable:
    """The root's entry of each region, zeros where it has none."""
    rows = np.zeros(len(regions), ROOT_ENTRY)
    known = regions_of(root)
    order = np.argsort(known)
    at = np.searchsorted(known[order], regions)
    there = at < len(root)
    there[there] = known[order][at[there]] == regions[there]
    rows[there] = root[order][at[there]]
    return rows
