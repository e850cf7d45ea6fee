"""The catalog: a snapshot, then the entries of log 0 behind it (FORMAT.md, Catalog)."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import msgspec
from crc32c import crc32c

from objstore.check.documents import identity, member
from objstore.check.epochs import Line
from objstore.check.layout import BLOCK_MASK, PAGE, Damaged, Owner, Record, segment_header
from objstore.check.members import Store, copy_of, number_of
from objstore.check.report import Repair, Severity
from objstore.check.segments import segment_name
from objstore.check.tail import Row, Rules, read_tail

SNAPSHOT_BYTES_MAX: Final = 1 << 30
_SNAPSHOT_HEADER_BYTES: Final = 24
_CRC_AT: Final = 20
WEIGHT_MAX: Final = 10_000
JOB_STATES: Final = frozenset({"running", "done", "failed", "aborted"})


class Vdi(NamedTuple):
    """A VDI as the catalog describes it. base: id of the snapshot that it is a clone of, 0 = none; hidden: it was
    deleted, its snapshots were not, or it is in the trash."""

    name: str
    log: int
    size_bytes: int
    copies: int
    base: int = 0
    hidden: bool = False
    former_bytes: int = 0

    @property
    def blocks(self) -> int:
        return -(-self.size_bytes // PAGE)

    @property
    def blocks_max(self) -> int:
        """Behind this nothing may be in its map."""
        return -(-max(self.size_bytes, self.former_bytes) // PAGE)


class Snapshot(NamedTuple):
    """A snapshot as the catalog describes it."""

    name: str
    log: int
    checkpoint: int
    position: int
    vdi: int


class Head(NamedTuple):
    """The committed head of a log."""

    log: int
    generation: int
    tail: tuple[Row, ...]
    first_number: int
    checkpoint: int
    clean: bool
    epoch: bytes
    copies: int
    base_checkpoint: int
    first_checkpoint: int


@dataclass
class Catalog:
    """What the store has, after the last entry."""

    next_log: int = 1
    vdis: dict[int, Vdi] = field(default_factory=dict)
    heads: dict[int, Head] = field(default_factory=dict)
    garbage: set[int] = field(default_factory=set)
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    attributes: dict[tuple[int, str], bytes] = field(default_factory=dict)
    """By VDI and name."""
    trash: set[int] = field(default_factory=set)
    """VDIs that are hidden and whose contents stay."""
    clean: bool = False

    def apply(self, entry: Mapping[str, Any]) -> None:
        """One entry. Damaged: it is none that FORMAT.md knows."""
        fields = dict(entry)
        kind = fields.get("type")
        self.clean = kind == "stop"
        if kind == "vdi":
            self._add_vdi(fields)
        elif kind == "delete":
            vdi = self.vdis.pop(member(fields, "vdi_id", int), None)
            if vdi is None:
                raise Damaged(f"the catalog deletes VDI {fields['vdi_id']}, which does not exist")
            self.heads.pop(vdi.log, None)
            self.garbage.add(vdi.log)
            self._drop_attributes(fields["vdi_id"])
            self.trash.discard(fields["vdi_id"])
        elif kind == "trash":
            self._note_trash(fields)
        elif kind == "head":
            self._add_head(fields)
        elif kind == "purged":
            self.garbage.discard(member(fields, "log", int))
        elif kind == "damage":
            _check_damage(fields)
        elif kind == "snapshot":
            self._add_snapshot(fields)
        elif kind == "snapshot-delete":
            number = member(fields, "snapshot_id", int)
            if self.snapshots.pop(number, None) is None:
                raise Damaged(f"the catalog deletes snapshot {number}, which does not exist")
        elif kind == "import":
            if member(fields, "vdi_id", int) not in self.vdis and member(fields, "identity", str):
                raise Damaged(f"the catalog imports into VDI {fields['vdi_id']}, which does not exist")
            member(fields, "base", str)
        elif kind == "job":
            self._note_job(fields)
        elif kind == "attribute":
            self._set_attribute(fields)
        elif kind != "stop":
            raise Damaged(f"the catalog has an entry of unknown type {kind!r}")

    def _add_vdi(self, fields: dict[str, Any]) -> None:
        size_bytes, copies = member(fields, "size_bytes", int), member(fields, "copies", int)
        log = member(fields, "log", int)
        if not size_bytes or not copies or not 1 <= log < 1 << 24:
            raise Damaged(f"the catalog describes a VDI as {fields!r}")
        base = member(fields, "base", int) if "base" in fields else 0
        name, hidden = member(fields, "name", str), bool(fields.get("hidden", False))
        former = member(fields, "former_bytes", int) if "former_bytes" in fields else 0
        member({"suspended": ""} | fields, "suspended", str)
        _check_limits(fields.get("limits", {}))
        if not 1 <= member({"weight": 100} | fields, "weight", int) <= WEIGHT_MAX:
            raise Damaged(f"weight of a VDI is {fields['weight']!r}")
        self.vdis[member(fields, "vdi_id", int)] = Vdi(name, log, size_bytes, copies, base, hidden, former)
        self.next_log = max(self.next_log, log + 1)
        if not hidden:
            self.trash.discard(fields["vdi_id"])
        elif fields["vdi_id"] not in self.trash:
            self._drop_attributes(fields["vdi_id"])

    def _note_trash(self, fields: dict[str, Any]) -> None:
        number = member(fields, "vdi_id", int)
        times = [fields.get(name) for name in ("deleted", "kept_until")]
        if number not in self.vdis or not all(isinstance(time, int | float) for time in times):
            raise Damaged(f"the catalog describes what is in the trash as {fields!r:.200}")
        if times[1]:
            self.trash.add(number)
        else:
            self.trash.discard(number)
            self._drop_attributes(number)

    def _note_job(self, fields: dict[str, Any]) -> None:
        done, length = member(fields, "bytes_done", int), member(fields, "length_bytes", int)
        if not member(fields, "job_id", int) or done > length or member(fields, "state", str) not in JOB_STATES:
            raise Damaged(f"the catalog describes a job as {fields!r:.200}")
        for name in ("kind", "vdi"):
            member(fields, name, str)
        for name in ("started", "noted"):
            if not isinstance(fields.get(name), int | float):
                raise Damaged(f"the catalog describes a job as {fields!r:.200}")

    def _set_attribute(self, fields: dict[str, Any]) -> None:
        number, name = member(fields, "vdi_id", int), member(fields, "name", str)
        value = fields.get("value", b"")
        if not 1 <= len(name.encode()) <= 256 or not isinstance(value, bytes | None) or len(value or b"") > 1 << 16:
            raise Damaged(f"the catalog describes an attribute as {fields!r:.200}")
        if value is None:
            self.attributes.pop((number, name), None)
        elif number in self.vdis and (number in self.trash or not self.vdis[number].hidden):
            self.attributes[number, name] = value

    def _drop_attributes(self, number: int) -> None:
        self.attributes = {key: value for key, value in self.attributes.items() if key[0] != number}

    def _add_snapshot(self, fields: dict[str, Any]) -> None:
        log, checkpoint = member(fields, "log", int), member(fields, "checkpoint", int)
        vdi, index = member(fields, "vdi_id", int), member(fields, "index", int)
        if not checkpoint or not (index or fields.get("hidden")) or not member(fields, "size_bytes", int):
            raise Damaged(f"the catalog describes a snapshot as {fields!r}")
        name = f"@{member(fields, 'tag', str) or index}"
        member({"origin": ""} | fields, "origin", str)
        number, position = member(fields, "snapshot_id", int), member(fields, "position", int)
        self.snapshots[number] = Snapshot(name, log, checkpoint, position, vdi)

    def contradiction(self) -> str:
        """What of snapshots and clones refers to something that is not there; empty if nothing does."""
        logs = {vdi.log for vdi in self.vdis.values()}
        for snapshot in self.snapshots.values():
            if snapshot.log not in logs or snapshot.vdi not in self.vdis:
                return f"the snapshot of log {snapshot.log} at checkpoint {snapshot.checkpoint} belongs to no VDI"
        for number in self.trash:
            if not self.vdis[number].hidden:
                return f"VDI {self.vdis[number].name} is in the trash and can be opened"
        for vdi in self.vdis.values():
            if vdi.base and vdi.base not in self.snapshots:
                return f"VDI {vdi.name} is a clone of snapshot {vdi.base}, which does not exist"
        return ""

    def snapshots_in(self, log: int) -> list[Snapshot]:
        """The snapshots whose maps are in that log, under their whole names, oldest first."""
        found = sorted((s for s in self.snapshots.values() if s.log == log), key=lambda s: s.checkpoint)
        return [s._replace(name=self.vdis[s.vdi].name + s.name) for s in found]

    def _add_head(self, fields: dict[str, Any]) -> None:
        tail = tuple(_row(entry) for entry in member(fields, "tail", list))
        log, generation = member(fields, "log", int), member(fields, "generation", int)
        first_number, checkpoint = member(fields, "first_number", int), member(fields, "checkpoint", int)
        clean = member(fields, "clean", bool)
        epoch, copies = identity(fields, "epoch"), member(fields, "copies", int)
        base, first, unbroken = (
            member(fields, name, int) if name in fields else 0
            for name in ("base_checkpoint", "first_checkpoint", "unbroken_since")
        )
        if unbroken > generation:
            raise Damaged(f"the head of log {log} has generation {generation} and is unbroken since {unbroken}")
        self.heads[log] = Head(log, generation, tail, first_number, checkpoint, clean, epoch, copies, base, first)


def _row(entry: object) -> Row:
    """One row of a head's tail."""
    if not isinstance(entry, list | tuple) or not all(type(value) is int and value >= 0 for value in entry):
        raise Damaged(f"a head's tail has {entry!r}")
    if len(entry) != 3 or entry[0] >= 1 << 28 or not 0 < entry[2] < 1 << 64:
        raise Damaged(f"a head's tail has {entry!r}")
    return Row(*entry)


def _check_limits(limits: object) -> None:
    """Damaged: not a map of kinds to rate and burst."""
    if not isinstance(limits, dict):
        raise Damaged(f"limits of a VDI are {limits!r}")
    for kind, row in limits.items():
        if not isinstance(kind, str) or not isinstance(row, list) or len(row) != 2:
            raise Damaged(f"limits of a VDI are {limits!r}")
        if not all(type(number) is int and number >= 0 for number in row):
            raise Damaged(f"limit {kind} of a VDI is {row!r}")


def _check_damage(fields: dict[str, Any]) -> None:
    """What is known to be damaged: a list to show; what really is damaged the check sees itself."""
    member(fields, "log", int)
    member(fields, "complete", bool)
    for name, length in (("runs", 3), ("pages", 4)):
        for row in member(fields, name, list):
            if not isinstance(row, list) or len(row) != length or not all(type(v) is int and v >= 0 for v in row):
                raise Damaged(f"{name} of damage has {row!r}")


def catalog_name(number: int) -> str:
    return f"catalog/{number:08x}"


def snapshot(data: bytes, store: bytes, number: int) -> Catalog:
    """A catalog snapshot."""
    if len(data) < _SNAPSHOT_HEADER_BYTES or _crc(data) != int.from_bytes(data[20:24], "little"):
        raise Damaged("the snapshot has a wrong checksum")
    if data[:16] != store or int.from_bytes(data[16:20], "little") != number:
        raise Damaged("the snapshot belongs to another store or has another number")
    fields = _unpack(data[_SNAPSHOT_HEADER_BYTES:])
    found = Catalog()
    for name in ("vdis", "heads"):
        for entry in member(fields, name, list):
            if not isinstance(entry, dict):
                raise Damaged(f"the snapshot has {entry!r} in {name}")
            found.apply(entry)
    lists = (fields.get(name, []) for name in ("trash", "snapshots", "attributes", "jobs"))
    for entry in itertools.chain.from_iterable(lists):
        if not isinstance(entry, dict):
            raise Damaged(f"the snapshot has {entry!r} in snapshots")
        found.apply(entry)
    for entry in member(fields, "damage", list) if "damage" in fields else ():
        if not isinstance(entry, dict):
            raise Damaged(f"the snapshot has {entry!r} in damage")
        _check_damage(entry)
    found.garbage = {log for log in member(fields, "garbage", list) if isinstance(log, int)}
    found.next_log = max(found.next_log, member(fields, "next_log", int))
    found.clean = member(fields, "clean", bool)
    return found


def _crc(data: bytes) -> int:
    """CRC over bytes 0-19 and the body: the field itself is left out, not zero."""
    return int(crc32c(data[_SNAPSHOT_HEADER_BYTES:], crc32c(data[:_CRC_AT])))


def _unpack(data: bytes) -> dict[str, Any]:
    try:
        value = msgspec.msgpack.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged("the catalog has something that is no msgpack") from error
    if not isinstance(value, dict):
        raise Damaged("the catalog has something that is no msgpack map")
    return value


def read_catalog(store: Store, line: Line) -> Catalog | None:
    """The catalog as it is now; None if it can't be read, which is reported."""
    head = line.newest.catalog
    begun = next(epoch.id for epoch in line.epochs if epoch.catalog == head)
    found = _read_snapshot(store, head.snapshot)
    if found is None:
        return None
    entries: list[dict[str, Any]] = []
    rules = Rules(lambda header: store.by_ids(line.holders(header.zones, header.epoch_id)), seals=False)

    def on_record(record: Record, data: memoryview) -> None:
        for word, count in zip(record.operations.words.tolist(), record.operations.counts.tolist(), strict=True):
            length = word & BLOCK_MASK
            if length > count * PAGE or bytes(data[length : count * PAGE]).strip(b"\0"):
                raise Damaged("an entry of the catalog has a wrong length")
            entries.append(_unpack(bytes(data[:length])))
            rules.clean = entries[-1].get("type") == "stop"
            data = data[count * PAGE :]

    rules.on_record = on_record
    gone = line.unknown_end(begun, 64)
    if gone:
        names = ", ".join(zone.hex()[:8] for zone in gone)
        store.add(Severity.UNAVAILABLE, "catalog", f"may go on in zones that are not here: {names}")
    holders = listing(store, "log/000000", 7)
    numbers, leftover = _segments_that_count(store, line, holders)
    try:
        tail = read_tail(store, Owner(store.id, 0), holders, numbers, (head.position, head.previous_crc), rules)
        for entry in entries:
            found.apply(entry)
        if problem := found.contradiction():
            raise Damaged(problem)
    except Damaged as error:
        store.add(Severity.DAMAGE, "catalog", str(error))
        return None
    store.report.checked["catalog entries"] += len(entries)
    if tail.position < tail.claim:
        return None
    for number, zones in leftover:
        for zone in zones:
            name = segment_name(0, number)
            text = "is left over: the catalog does not continue in it"
            repair = Repair(zone, name)
            store.add(Severity.NOTE, "orphan", text, zone=zone, name=name, repair=repair)
    return found


def _read_snapshot(store: Store, number: int) -> Catalog | None:
    """The snapshot of that number from any zone; others are left over."""
    name = catalog_name(number)
    if number == 0:
        found: Catalog | None = Catalog()
    else:
        found, good, problems = None, None, {}
        first = b""
        for zone in sorted(store.serving):
            try:
                data = store.load(zone, name, SNAPSHOT_BYTES_MAX)
                if data is None:
                    raise Damaged("is missing")
                found, good = snapshot(data, store.id, number), zone
                if first and data != first:
                    store.add(Severity.DAMAGE, "copies-differ", "is not what other zones have", zone=zone, name=name)
                first = data
            except Damaged as error:
                problems[zone] = str(error)
        for zone, problem in problems.items():
            repair = None if good is None else copy_of(store, good, zone, name, SNAPSHOT_BYTES_MAX)
            kind = "missing-copy" if problem == "is missing" else "bad-copy"
            store.add(Severity.FAULT, kind, problem, zone=zone, name=name, repair=repair)
        if found is None:
            store.add(Severity.DAMAGE, "catalog", "no zone has the catalog's snapshot", name=name)
    for other, zones in listing(store, "catalog", 8).items():
        if other != number:
            for zone in zones:
                old = catalog_name(other)
                text = "is left over: the epoch in force does not name it"
                store.add(Severity.NOTE, "orphan", text, zone=zone, name=old, repair=Repair(zone, old))
    return found


def _segments_that_count(
    store: Store, line: Line, holders: Mapping[int, list[int]]
) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """Numbers of log 0's segments that count, and the others with the zones that have them."""
    head = line.newest.catalog
    counting, leftover = [], []
    for number, zones in sorted(holders.items()):
        if number >= head.first_number and counts(store, line, Owner(store.id, 0), number, zones, head.generation):
            counting.append(number)
        else:
            leftover.append((number, zones))
    return counting, leftover


def counts(store: Store, line: Line, owner: Owner, number: int, zones: list[int], generation: int) -> bool:
    """Whether any valid header of a segment's copies is of that generation and of the line of epochs."""
    for zone in zones:
        try:
            header = segment_header(store.zones[zone].read(segment_name(owner.log, number), 0, PAGE), owner, number)
        except (OSError, Damaged):
            continue
        if header.generation == generation and line.names(header.epoch, header.epoch_id):
            return True
    return False


def listing(store: Store, folder: str, digits: int) -> dict[int, list[int]]:
    """Objects of a folder by number, with the zones that list them. Names that are no numbers are noted."""
    found: dict[int, list[int]] = {}
    for zone in store.everyone:
        for text in store.zones[zone].list(folder):
            number = number_of(text, digits)
            if number is None:
                name = f"{folder}/{text}"
                store.add(Severity.NOTE, "unknown", "is nothing that a zone has", zone=zone, name=name)
            else:
                found.setdefault(number, []).append(zone)
    return dict(sorted(found.items()))
