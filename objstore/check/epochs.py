"""Which epoch is in force, and whose copies of a log's end are believed (FORMAT.md, Zones and epochs; Whom to believe).

Pure rules over the records that the zones here hold. Zones are known by identity.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

from objstore.check.documents import Epoch

Held = Mapping[bytes, Mapping[int, bytes]]
"""For each zone that is here: the ids of its records by number."""


class Choice(NamedTuple):
    """The epoch that a start would go on from. openable: it may without force."""

    epoch: Epoch
    openable: bool


@dataclass(frozen=True)
class Line:
    """The epoch in force and its ancestors as far as they are known, the oldest first.

    held: ids of the records that each zone here holds.
    """

    epochs: tuple[Epoch, ...]
    held: Mapping[bytes, AbstractSet[bytes]]

    @property
    def newest(self) -> Epoch:
        return self.epochs[-1]

    def names(self, number: int, identity: bytes) -> bool:
        """Whether an epoch is one of the line, as far back as the line is known."""
        return number < self.epochs[0].number or any(epoch.id == identity for epoch in self.epochs)

    def rest_of_run(self, identity: bytes) -> tuple[Epoch, ...]:
        """An epoch of the line and those behind it up to the last complete one of its run; () if it is not known."""
        at = next((index for index, epoch in enumerate(self.epochs) if epoch.id == identity), None)
        if at is None:
            return ()
        run = [self.epochs[at]]
        for epoch in self.epochs[at + 1 :]:
            if epoch.start:
                break
            run.append(epoch)
        while len(run) > 1 and not run[-1].complete:
            run.pop()
        return tuple(run)

    def holders(self, listed: Iterable[bytes], identity: bytes) -> frozenset[bytes]:
        """Zones here whose copy of a segment behind the head is believed. listed: by its header, made in `identity`."""
        zones = frozenset(listed)
        last = identity
        for epoch in self.rest_of_run(identity):
            left = zones & epoch.ids
            if not left:
                break
            zones, last = left, epoch.id
        return frozenset(zone for zone in zones if zone in self.held and last in self.held[zone])

    def unknown_end(self, identity: bytes, copies: int) -> list[bytes]:
        """Zones that are not here (or only as an old copy) and may alone hold what a log got after its head."""
        run = self.rest_of_run(identity)
        if not run:
            everyone = (*self.newest.members, *self.newest.out)
            return [zone.id for zone in everyone if zone.id not in self.held]
        known = {zone.id for zone in (*self.newest.members, *self.newest.out)}
        for epoch in run:
            placing = [zone.id for zone in epoch.members if zone.placing]
            gone = [zone for zone in placing if zone in known and epoch.id not in self.held.get(zone, ())]
            if gone and len(gone) >= min(copies, len(placing)):
                return gone
        return []


def choose(records: Mapping[bytes, Epoch], held: Held) -> Choice | None:
    """The epoch to take. records: all that are known, by id, `complete` if any copy is. None: there is none."""
    alive = [epoch for epoch in records.values() if not _dead(epoch, records, held)]
    tips = {zone: _tip(numbers, alive) for zone, numbers in held.items()}
    order = sorted(alive, key=lambda epoch: (epoch.complete, epoch.number), reverse=True)
    for epoch in order:
        if _openable(epoch, records, tips):
            return Choice(epoch, True)
    return Choice(order[0], False) if order else None


def ancestors(epoch: Epoch, records: Mapping[bytes, Epoch]) -> list[Epoch]:
    """The known ones, the nearest first."""
    found = []
    while epoch.parent in records and records[epoch.parent].number < epoch.number:
        epoch = records[epoch.parent]
        found.append(epoch)
    return found


def _dead(epoch: Epoch, records: Mapping[bytes, Epoch], held: Held) -> bool:
    """Not complete, and a member here lacks it or went on with another one."""
    if epoch.complete:
        return False
    for zone in epoch.ids & held.keys():
        ids = held[zone]
        if ids.get(epoch.number) != epoch.id:
            return True
        for number, identity in ids.items():
            later = records.get(identity) if number > epoch.number else None
            if later is not None and epoch not in ancestors(later, records):
                return True
    return False


def _tip(numbers: Mapping[int, bytes], alive: list[Epoch]) -> bytes | None:
    living = {epoch.id for epoch in alive}
    return next((numbers[number] for number in sorted(numbers, reverse=True) if numbers[number] in living), None)


def _openable(epoch: Epoch, records: Mapping[bytes, Epoch], tips: Mapping[bytes, bytes | None]) -> bool:
    witnesses = sum(tips.get(zone) == epoch.id for zone in epoch.ids)
    if witnesses <= len(epoch.members) - epoch.w:
        return False
    line = [epoch, *ancestors(epoch, records)]
    for older in line:
        if len(older.ids & tips.keys()) < older.w:
            return False
        if older.complete:
            break
    return all(_gone_by(other, line, records) for other in records.values() if other.complete)


def _gone_by(other: Epoch, line: list[Epoch], records: Mapping[bytes, Epoch]) -> bool:
    """Whether a complete record is no rival of the line's newest epoch."""
    if other in line or other.number < min(epoch.number for epoch in line):
        return True
    branch = [other, *ancestors(other, records)]
    fork = next((epoch.number for epoch in branch if epoch in line), 0)
    branch = [epoch for epoch in branch if epoch not in line]
    forced = any(epoch.forced and epoch.number > fork for epoch in line)
    return forced and not any(epoch.forced for epoch in branch)


def line_of(epoch: Epoch, records: Mapping[bytes, Epoch], held: Held) -> Line:
    """The epoch with its ancestors."""
    past = tuple(reversed(ancestors(epoch, records)))
    return Line((*past, epoch), {zone: frozenset(ids.values()) for zone, ids in held.items()})
