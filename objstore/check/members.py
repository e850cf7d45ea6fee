"""Which zones a store has, which of them are here, and which epoch is in force."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from objstore.check.documents import DOCUMENT_BYTES_MAX, Epoch, Member, Superblock, epoch, hint, superblock
from objstore.check.epochs import Line, choose, line_of
from objstore.check.layout import Damaged
from objstore.check.report import Finding, Repair, Report, Severity
from objstore.check.zones import APART, TOP_NAMES, ZoneReader
from objstore.errors import InvalidRequest, NewerFormat, NotFound


@dataclass
class Store:
    """A store under check: its zones by index, what is missing, and where findings go.

    zones: readers of the zones that are here and belong to the store; numbers, ids: of the same ones. serving: indexes
    of those that are members of the epoch in force. missing: zones of the store that are not here, by number.
    members, placing: numbers of the epoch's members, and of those that get new data.
    """

    zones: Sequence[ZoneReader]
    report: Report
    on_progress: Callable[[int], object]
    id: bytes = b""
    numbers: list[int] = field(default_factory=list)
    ids: list[bytes] = field(default_factory=list)
    serving: frozenset[int] = frozenset()
    missing: dict[int, Member] = field(default_factory=dict)
    members: frozenset[int] = frozenset()
    placing: frozenset[int] = frozenset()
    nameless: list[tuple[ZoneReader, str]] = field(default_factory=list)
    """Zones without a superblock that can be read, and what is wrong with it."""

    def add(
        self,
        severity: Severity,
        kind: str,
        text: str,
        *,
        zone: int | None = None,
        name: str = "",
        vdi: str = "",
        ranges: Sequence[tuple[int, int]] = (),
        repair: Repair | None = None,
    ) -> None:
        """Report a finding. zone: index. Zones that are out of service are not repaired."""
        label = "" if zone is None else self.zones[zone].label
        if zone is not None and zone not in self.serving:
            repair = None
        self.report.add(Finding(severity, kind, text, label, name, vdi, ranges, repair))

    def load(self, zone: int, name: str, bytes_max: int) -> bytes | None:
        """A whole object, None if the zone doesn't have it. Damaged: it can't be read."""
        data = _load(self.zones[zone], name, bytes_max)
        if data is not None:
            self.advance(len(data))
        return data

    def advance(self, size: int) -> None:
        """So many more bytes were looked at."""
        self.report.checked["bytes"] += size
        self.on_progress(size)

    def by_mask(self, mask: int) -> tuple[list[int], list[int]]:
        """Zones of a mask: indexes of those that are here, numbers of those that are not."""
        here = [index for index, number in enumerate(self.numbers) if mask >> number & 1]
        absent = [number for number in range(64) if mask >> number & 1 and number not in self.numbers]
        return here, absent

    def by_ids(self, ids: Iterable[bytes]) -> list[int]:
        """Indexes of those of the zones that are here."""
        wanted = set(ids)
        return [index for index, zone in enumerate(self.ids) if zone in wanted]

    @property
    def everyone(self) -> range:
        """Indexes of all zones that are here."""
        return range(len(self.zones))


def _load(reader: ZoneReader, name: str, bytes_max: int) -> bytes | None:
    try:
        size = reader.size(name)
        if size is None:
            return None
        if size > bytes_max:
            raise Damaged(f"{size} bytes, more than any such object has")
        data = reader.read(name, 0, size)
    except OSError as error:
        raise Damaged(f"cannot be read: {error.strerror or error}") from error
    if len(data) != size:
        raise Damaged(f"only {len(data)} of {size} bytes can be read")
    return data


def read_superblock(zone: ZoneReader) -> Superblock:
    """NotFound: the zone has none. Damaged: it can't be read. NewerFormat: not by this program."""
    data = _load(zone, "superblock", DOCUMENT_BYTES_MAX)
    if data is None:
        raise NotFound(f"{zone.label} is no zone of a store: it has no superblock")
    return superblock(data)


def check_superblocks(store: Store) -> None:
    """Find out whose zones these are; those without a readable superblock are not here.

    InvalidRequest: they can't be checked together. NotFound: none is a zone. NewerFormat: they are of a later format.
    """
    zones: list[ZoneReader] = []
    newer: NewerFormat | None = None
    for zone in store.zones:
        try:
            block = read_superblock(zone)
        except NewerFormat as error:
            # One rotten digit looks like it. Where other zones can be read, it is that.
            newer = newer or error
            problem = str(error)
        except (Damaged, NotFound) as error:
            problem = str(error)
        else:
            if store.id and block.store != store.id:
                raise InvalidRequest(f"{zone.label} belongs to another store than {zones[0].label}")
            if block.zone in store.ids:
                raise InvalidRequest(
                    f"{zone.label} is a copy of another zone that was named: both say that they are one"
                )
            store.id = block.store
            store.ids.append(block.zone)
            zones.append(zone)
            continue
        store.nameless.append((zone, problem))
    if not zones:
        if newer is not None:
            raise newer
        raise NotFound(f"no superblock can be read in {', '.join(zone.label for zone in store.zones)}")
    store.zones = zones
    store.report.store = store.id.hex()


def check_top(store: Store) -> None:
    """Names in a zone that belong to nothing; the notes of scrub and recovery, hints that nobody misses."""
    for index in store.everyone:
        for kind in ("scrub", "recovery"):
            try:
                note = store.load(index, kind, DOCUMENT_BYTES_MAX)
                if note is not None:
                    hint(note, kind)
            except Damaged as error:
                repair = Repair(index, kind)
                store.add(Severity.FAULT, "bad-copy", str(error), zone=index, name=kind, repair=repair)
        for name in store.zones[index].list(""):
            if name not in TOP_NAMES | APART:
                store.add(Severity.NOTE, "unknown", "is nothing that a zone has", zone=index, name=name)


def epoch_in_force(store: Store) -> Line | None:
    """The epoch that the next start goes on from, with its line; None if there is none, which is reported.

    NotFound: the store was never opened.
    """
    held, damaged = _read_records(store)
    records: dict[bytes, Epoch] = {}
    for found in held.values():
        for record in found.values():
            known = records.get(record.id)
            if known is not None and known._replace(complete=record.complete) != record:
                text = "two records of one id say different things"
                store.report.add(Finding(Severity.DAMAGE, "epoch", text, name=epoch_name(record.number)))
            if known is None or record.complete:
                records[record.id] = record
    ids = {zone: {number: record.id for number, record in found.items()} for zone, found in held.items()}
    _count_damaged(store, ids, damaged)
    choice = choose(records, ids)
    if choice is None:
        if not damaged and not any(zone.list("log") for zone in store.zones):
            raise NotFound("this store was never opened; it holds nothing")
        store.report.add(Finding(Severity.DAMAGE, "epoch", "no epoch is in force: the store's catalog can't be found"))
        return None
    chosen = choice.epoch
    _take_members(store, chosen)
    if not choice.openable:
        gone = ", ".join(zone.path for zone in chosen.members if zone.id not in ids) or "none is missing"
        text = f"epoch {chosen.number} may not be opened: too few of its members are here (missing: {gone})"
        store.report.add(Finding(Severity.UNAVAILABLE, "epoch", text))
    _report_damaged(store, records, damaged)
    for zone in store.serving:
        if ids.get(store.ids[zone], {}).get(chosen.number) != chosen.id:
            text = "is missing, though the zone is a member: it may come from a backup"
            severity = Severity.FAULT if chosen.complete else Severity.NOTE
            store.add(severity, "missing-copy", text, zone=zone, name=epoch_name(chosen.number))
    return line_of(chosen, records, ids)


def epoch_name(number: int) -> str:
    return f"epoch/{number:08x}"


def _read_records(store: Store) -> tuple[dict[bytes, dict[int, Epoch]], list[tuple[bytes, int, str]]]:
    """Records by zone and number, and (zone, number, what is wrong) of those that can't be read."""
    held: dict[bytes, dict[int, Epoch]] = {zone: {} for zone in store.ids}
    damaged = []
    newer: dict[int, NewerFormat] = {}
    for index in store.everyone:
        for text in store.zones[index].list("epoch"):
            number = number_of(text, 8)
            if number is None:
                store.add(Severity.NOTE, "unknown", "is no name of an epoch", zone=index, name=f"epoch/{text}")
                continue
            try:
                data = store.load(index, f"epoch/{text}", DOCUMENT_BYTES_MAX)
                held[store.ids[index]][number] = epoch(data or b"", number)
            except NewerFormat as error:
                newer[number] = error
                damaged.append((store.ids[index], number, str(error)))
            except Damaged as error:
                damaged.append((store.ids[index], number, str(error)))
    for number, refusal in newer.items():
        if not any(number in found for found in held.values()):
            raise refusal
    return held, damaged


def _count_damaged(store: Store, ids: dict[bytes, dict[int, bytes]], damaged: list[tuple[bytes, int, str]]) -> None:
    """A damaged record counts as held if it is clear which it is; else, if it is the newest, its zone is not here."""
    for zone, number, _ in damaged:
        texts = {found[number] for other, found in ids.items() if other != zone and number in found}
        if len(texts) == 1 and zone in ids:
            ids[zone][number] = texts.pop()
        elif zone in ids and number > max(ids[zone], default=0):
            del ids[zone]


def _take_members(store: Store, chosen: Epoch) -> None:
    """Keep the zones that the epoch knows, number them, and say which ones are missing or out."""
    known = {zone.id: zone for zone in (*chosen.members, *chosen.out)}
    zones, ids = [], []
    for reader, identity in zip(store.zones, store.ids, strict=True):
        if identity in known:
            zones.append(reader)
            ids.append(identity)
        else:
            text = "belongs to the store by its superblock, and the epoch in force does not know it: left alone"
            store.report.add(Finding(Severity.NOTE, "unknown-zone", text, reader.label))
    store.zones, store.ids = zones, ids
    store.numbers = [known[identity].number for identity in ids]
    store.members = frozenset(zone.number for zone in chosen.members)
    store.placing = frozenset(zone.number for zone in chosen.members if zone.placing)
    store.serving = frozenset(index for index, number in enumerate(store.numbers) if number in store.members)
    store.missing = {zone.number: zone for zone in known.values() if zone.id not in ids}
    report = store.report
    report.epoch = chosen.number
    for index, number in enumerate(store.numbers):
        report.zones.append((number, store.zones[index].label, "checked" if index in store.serving else "out"))
    report.zones += [(number, zone.path, "missing") for number, zone in store.missing.items()]
    for zone in chosen.members:
        if zone.number in store.missing:
            text = f"zone {zone.number} is missing; it was last seen as {zone.path}"
            report.add(Finding(Severity.FAULT, "missing-zone", text))
    for zone in chosen.out:
        text = f"zone {zone.number} is out of service ({zone.reason or 'no reason given'})"
        text += f"; it was last seen as {zone.path}" if zone.number in store.missing else ""
        label = "" if zone.number in store.missing else store.zones[store.numbers.index(zone.number)].label
        report.add(Finding(Severity.FAULT, "zone-out", text, label))


def _report_damaged(store: Store, records: dict[bytes, Epoch], damaged: list[tuple[bytes, int, str]]) -> None:
    """Damaged records of zones of the store. One that can be known is copied."""
    for zone, number, problem in damaged:
        if zone not in store.ids:
            continue
        index = store.ids.index(zone)
        same = [record for record in records.values() if record.number == number]
        name = epoch_name(number)
        repair = None
        if len(same) == 1:
            source = next((other for other in store.everyone if other != index and _holds(store, other, same[0])), None)
            repair = None if source is None else copy_of(store, source, index, name, DOCUMENT_BYTES_MAX)
        store.add(Severity.FAULT, "bad-copy", problem, zone=index, name=name, repair=repair)


def _holds(store: Store, zone: int, record: Epoch) -> bool:
    try:
        data = _load(store.zones[zone], epoch_name(record.number), DOCUMENT_BYTES_MAX)
        return data is not None and epoch(data, record.number).id == record.id
    except (Damaged, NewerFormat):
        return False


def number_of(text: str, digits: int) -> int | None:
    """The number that an object's name means; None if it is none of so many hexadecimal digits."""
    return int(text, 16) if re.fullmatch(rf"[0-9a-f]{{{digits}}}", text) else None


def copy_of(store: Store, source: int, target: int, name: str, bytes_max: int) -> Repair:
    """A repair that copies an object as it is from one zone to another."""

    def data() -> bytes:
        found = store.load(source, name, bytes_max)
        if found is None:
            raise Damaged("is gone")
        return found

    return Repair(target, name, data)
