"""Which epoch a store may be opened in, and who may be believed: pure rules. FORMAT.md, "Zones and epochs".

An epoch names the zones that a flush waits for. Its record goes to every member, then once more, marked complete; only
then anything is acknowledged in it. So:

- a record that some zone has marked was held by all its members: a member that lacks it was restored from a backup;
- a record that nobody here has marked and that a member that is here lacks, or has passed over for another one, was
  never in force: it is dead;
- among any n - w + 1 of an epoch's n members is one that the next epoch must have reached. So an epoch may be opened
  if that many of its members are here and know nothing newer that is alive;
- whoever writes an epoch on top of one of which it is unknown whether all had it owes w members to that one and to
  each before it, down to one that is known to have been complete.

Records count by identity and parent. A number tells only which of one zone's records is its newest.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from objstore.errors import Unavailable
from objstore.format.document import Epoch, Member

NO_EPOCH: Final = "0" * 32


class Quorum(NamedTuple):
    """At least `least` of the zones `ids` must hold the next epoch."""

    ids: frozenset[str]
    least: int


class Choice(NamedTuple):
    """What `choose_epoch` found.

    epoch: None if the store was never opened: no zone holds a record that counts. chain: it and
    those before it, newest first, as far as they are known, each marked complete if any copy is. quorums: what the next
    epoch owes. holders: for each zone here the ids of the records of the chain that it has. highest: the highest number
    seen. dropped: marked records of other branches, which a forced epoch has overruled.
    """

    epoch: Epoch | None
    chain: tuple[Epoch, ...]
    quorums: tuple[Quorum, ...]
    holders: Mapping[str, frozenset[str]]
    highest: int
    dropped: tuple[Epoch, ...]


def default_w(members: int, losses: int = 1) -> int:
    """How many members of an epoch with so many the next one needs: half of them, rounded up, or less where so many
    zones may be lost at once that fewer remain (copies - min_copies)."""
    return min(-(-members // 2), max(1, members - losses))


def choose_epoch(held: Mapping[str, Sequence[Epoch]], *, force: bool = False) -> Choice:
    """The epoch to open, from the records of every zone that is here (by zone id; none = it has none).

    Unavailable, naming the members that would have to be here too. force: then take the newest one all the same.
    """
    known = _merge(held)
    highest = max((epoch.number for epoch in known.values()), default=0)
    newest = _newest_alive(held, known)
    if not newest and not any(epoch.complete for epoch in known.values()):
        return Choice(None, (), (), {zone: frozenset() for zone in held}, highest, ())
    openable: list[tuple[Epoch, ...]] = []
    refused: list[tuple[Epoch, ...]] = []
    for epoch_id in set(newest.values()):
        chain = tuple(_chain(known, epoch_id))
        epoch = chain[0]
        witnesses = sum(1 for member in epoch.members if newest.get(member.id) == epoch_id)
        good = witnesses > len(epoch.members) - epoch.w
        good = good and all(quorum.least <= len(quorum.ids & held.keys()) for quorum in quorums_of(chain))
        good = good and all(_passed(other, chain, known) for other in known.values() if other.complete)
        (openable if good else refused).append(chain)
    if not openable and force:
        openable = refused
    if not openable:
        raise Unavailable(_refusal(refused, newest, held))
    chain = max(openable, key=lambda chain: (chain[0].complete, chain[0].number, chain[0].id))
    ids = {epoch.id for epoch in chain}
    holders = {zone: frozenset(epoch.id for epoch in epochs if epoch.id in ids) for zone, epochs in held.items()}
    dropped = tuple(e for e in known.values() if e.complete and e.id not in ids and e.number >= chain[-1].number)
    return Choice(chain[0], chain, tuple(quorums_of(chain)), holders, highest, dropped)


def quorums_of(chain: Sequence[Epoch]) -> Iterator[Quorum]:
    """What a successor of chain[0] owes: to it and to each before it, down to one that is known to be complete."""
    for epoch in chain:
        yield Quorum(frozenset(member.id for member in epoch.members), epoch.w)
        if epoch.complete:
            return


def meets(members: Iterable[Member], quorums: Iterable[Quorum]) -> bool:
    """Whether an epoch of these members may follow."""
    ids = {member.id for member in members}
    return all(len(ids & quorum.ids) >= quorum.least for quorum in quorums)


class History:
    """The chain of epochs, and which zones have all that was flushed in a stretch of it.

    A run is one process that had the store open: its start epoch and those that it made after it.
    """

    def __init__(self, chain: Sequence[Epoch], holders: Mapping[str, Collection[str]]) -> None:
        """chain: newest first. holders: zone id -> ids of the records that it has, of the zones that are here."""
        self._epochs = list(reversed(chain))
        self._at = {epoch.id: i for i, epoch in enumerate(self._epochs)}
        self._holders = {zone: set(ids) for zone, ids in holders.items()}

    @property
    def epochs(self) -> list[Epoch]:
        """The chain as far as it is known, oldest first."""
        return list(self._epochs)

    def add(self, epoch: Epoch) -> None:
        """A new epoch is in force; all its members hold it."""
        self._at[epoch.id] = len(self._epochs)
        self._epochs.append(epoch)
        for member in epoch.members:
            self._holders.setdefault(member.id, set()).add(epoch.id)

    def steady(self) -> bool:
        """Whether the run before this one had the members of now from its start to its end."""
        epochs = self._epochs
        own = max((i for i, epoch in enumerate(epochs) if epoch.start), default=0)
        start = next((i for i in reversed(range(own)) if epochs[i].start), None)
        if start is None:
            return False
        return all({m.id for m in e.members} == {m.id for m in epochs[-1].members} for e in epochs[start:])

    def learn(self, zone: str, ids: Collection[str]) -> None:
        """A zone that was not here has come, with these records."""
        self._holders.setdefault(zone, set()).update(ids)

    def __contains__(self, epoch_id: str) -> bool:
        return epoch_id in self._at

    def forced_since(self, epoch_id: str) -> bool:
        """Whether a branch may have been given up after that epoch: one was forced since, or nobody knows."""
        at = self._at.get(epoch_id)
        return at is None or any(epoch.forced for epoch in self._epochs[at + 1 :])

    def run_from(self, epoch_id: str) -> list[Epoch]:
        """The epochs from that one on to the last of its run that was in force, oldest first; itself at least.
        KeyError: the chain doesn't reach back to it."""
        start = self._at[epoch_id]
        found = [self._epochs[start]]
        for epoch in self._epochs[start + 1 :]:
            if epoch.start:
                break
            found.append(epoch)
        while len(found) > 1 and not found[-1].complete:
            found.pop()
        return found

    def lost_since(self, epoch_id: str) -> bool:
        """Whether a zone of the store that took data in that epoch or later in its run is not in service now."""
        if epoch_id not in self._at:
            return True
        missing = {zone.id for zone in self._epochs[-1].out}
        return any(m.id in missing for epoch in self.run_from(epoch_id) for m in epoch.members if m.state == "in")

    def known(self) -> frozenset[str]:
        """Zones that belong to the store now: in service or out, not removed."""
        newest = self._epochs[-1]
        return frozenset({m.id for m in newest.members} | {o.id for o in newest.out})

    def forgot(self, zone: str) -> bool:
        """Whether a zone that is here lacks the record of an epoch that was in force with it: it is a backup."""
        return any(
            e.complete and not self.knows(zone, e.id) for e in self._epochs if any(m.id == zone for m in e.members)
        )

    def lacking(self, zone: str) -> list[Epoch]:
        """The records that a zone may be given: those that it lacks and never was to have. One that it was to have and
        lacks shows that it is a backup, and must go on showing it."""
        held = self._holders.get(zone, ())
        return [e for e in self._epochs if e.id not in held and all(m.id != zone for m in e.members)]

    def current(self, epoch_id: str) -> frozenset[str]:
        """Zones that were members from that epoch to the end of its run without a break: present ones only if they
        know that end (a restored backup does not)."""
        epochs = self.run_from(epoch_id)
        zones = frozenset.intersection(*(frozenset(m.id for m in epoch.members) for epoch in epochs))
        last = epochs[-1].id
        return frozenset(z for z in zones if z not in self._holders or last in self._holders[z])

    def lasting(self, epoch_id: str, zones: Iterable[str]) -> list[str]:
        """Of the zones that hold a segment made in that epoch, those that were in service longest in its run: they have
        all that was flushed to it. Where all of them were put out, those that were so last. A zone that is here and
        doesn't know its last epoch (a restored backup) is none of them."""
        left = list(zones)
        last = epoch_id
        for epoch in self.run_from(epoch_id):
            members = {m.id for m in epoch.members}
            still = [z for z in left if z in members]
            if not still:
                break
            left, last = still, epoch.id
        return [z for z in left if z not in self._holders or last in self._holders[z]]

    def knows(self, zone: str, epoch_id: str) -> bool:
        """Whether a zone that is here holds that record."""
        return epoch_id in self._holders.get(zone, ())


def _merge(held: Mapping[str, Sequence[Epoch]]) -> dict[str, Epoch]:
    known: dict[str, Epoch] = {}
    for epochs in held.values():
        for epoch in epochs:
            if epoch.complete or epoch.id not in known:
                known[epoch.id] = epoch
    return known


def _chain(known: Mapping[str, Epoch], epoch_id: str) -> Iterator[Epoch]:
    while (epoch := known.get(epoch_id)) is not None:
        yield epoch
        epoch_id = epoch.parent


def _newest_alive(held: Mapping[str, Sequence[Epoch]], known: Mapping[str, Epoch]) -> dict[str, str]:
    """Zone -> id of the newest of its records that may have been in force."""
    ids = {zone: {epoch.id for epoch in epochs} for zone, epochs in held.items()}
    ordered = {zone: sorted(epochs, key=lambda epoch: epoch.number, reverse=True) for zone, epochs in held.items()}
    above = {zone: {epoch.id for epoch in _chain(known, epochs[0].id)} for zone, epochs in ordered.items() if epochs}

    def dead(epoch: Epoch) -> bool:
        if known[epoch.id].complete:
            return False
        here = [member.id for member in epoch.members if member.id in held]
        return any(epoch.id not in ids[zone] or epoch.id not in above[zone] for zone in here)

    newest = {}
    for zone, epochs in ordered.items():
        alive = next((epoch.id for epoch in epochs if not dead(epoch)), None)
        if alive is not None:
            newest[zone] = alive
    return newest


def _passed(complete: Epoch, chain: Sequence[Epoch], known: Mapping[str, Epoch]) -> bool:
    """Whether a complete record doesn't stand against opening the chain: it is part of it, older than all of it that is
    known, or on a branch that a forced epoch of the chain has left."""
    ids = [epoch.id for epoch in chain]
    if complete.id in ids or complete.number < chain[-1].number:
        return True
    fork = next((ids.index(epoch.id) for epoch in _chain(known, complete.id) if epoch.id in ids), len(ids))
    other_forced = False
    for epoch in _chain(known, complete.id):
        if epoch.id in ids:
            break
        other_forced = other_forced or epoch.forced
    return not other_forced and any(epoch.forced for epoch in chain[:fork])


def _refusal(chains: Sequence[Sequence[Epoch]], newest: Mapping[str, str], held: Collection[str]) -> str:
    """Which zones would have to be here for the newest of these epochs."""
    if not chains:
        return "no zone holds an epoch record that can be believed"
    chain = max(chains, key=lambda chain: (chain[0].complete, chain[0].number, chain[0].id))
    epoch = chain[0]
    missing = [m for e in chain[: len(list(quorums_of(chain)))] for m in e.members if m.id not in held]
    names = list(dict.fromkeys(f"{m.path} (zone {m.id[:8]})" for m in missing))
    stale = [f"{m.path} (zone {m.id[:8]})" for m in epoch.members if m.id in held and newest.get(m.id) != epoch.id]
    text = f"epoch {epoch.number} of {len(epoch.members)} zones needs {len(epoch.members) - epoch.w + 1} of them"
    if names:
        text += "; zones are missing: " + ", ".join(names)
    if stale:
        text += "; here, but with another past: " + ", ".join(stale)
    return text
