"""Whom to believe about the end of a log: which zones have all that was flushed to it. FORMAT.md, "Opening a log".

What a committed head or a checkpoint names is known by its checksum, so any zone may give it. What came after the head
is not: a zone that was put out meanwhile has a shorter copy that looks whole. The epochs of the run that wrote it tell
who was in service until its end.
"""

from collections.abc import Iterable

from objstore.log.env import Env
from objstore.replica.epochs import History


class Trust:
    """Judges zones for one opening. here: numbers of the zones that can be asked."""

    def __init__(self, env: Env, history: History | None) -> None:
        """history: None = every zone was always in service (a single log, without a store)."""
        self.here = frozenset(env.in_service)
        self._zones = env.zones
        self._history = history
        self._numbers = {zone.zone_id.hex(): zone.index for zone in env.zones}

    def lost(self, zone: int) -> None:
        """This zone does not answer any more."""
        self.here -= {zone}

    def knows(self, epoch_id: bytes) -> bool:
        """Whether that epoch is in this store's past. What was written in another one is no part of any log: it belongs
        to a branch that was given up."""
        return self._history is None or epoch_id.hex() in self._history

    def holders(self, epoch_id: bytes, zone_ids: Iterable[bytes]) -> tuple[int, ...]:
        """Of the zones that a segment's header lists, those that have all that was flushed to it; here or not."""
        ids = [zone_id.hex() for zone_id in zone_ids]
        if self._history is not None:
            ids = self._history.lasting(epoch_id.hex(), ids)
        return tuple(sorted(self._numbers[zone_id] for zone_id in ids if zone_id in self._numbers))

    def everywhere(self, epoch_id: str) -> frozenset[int]:
        """Zones that were in service from that epoch to the end of its run: all of them if it isn't known."""
        if self._history is None or epoch_id not in self._history:
            return frozenset(self._numbers.values())
        current = self._history.current(epoch_id)
        return frozenset(number for zone_id, number in self._numbers.items() if zone_id in current)

    def unanswered(self, epoch_id: str, copies: int | None) -> list[str]:
        """Names of zones that could together be the only ones to show a segment or checkpoint made from that epoch to
        the end of its run; empty: there can't be any.

        copies: objects were put on so many zones of each epoch, None = on all its members.
        """
        if self._history is None:
            return []
        known = self._history.known()
        if epoch_id not in self._history:
            return [repr(zone) for zone in self._zones if zone.index not in self.here and zone.zone_id.hex() in known]
        names: dict[str, None] = {}
        here = {zone.zone_id.hex() for zone in self._zones if zone.index in self.here}
        for epoch in self._history.run_from(epoch_id):
            members = [m for m in epoch.members if copies is None or m.state == "in"]
            # A zone that was removed since had nothing left that was not elsewhere, or what it had was given up.
            kept = [m for m in members if m.id in known]
            silent = [m for m in kept if m.id not in here or not self._history.knows(m.id, epoch.id)]
            if silent and len(silent) >= min(len(members), copies or len(members)):
                names.update(dict.fromkeys(self.named(m.id, m.path) for m in silent))
        return list(names)

    def named(self, zone_id: str, path: str) -> str:
        """A zone as messages name it."""
        number = self._numbers.get(zone_id)
        return repr(self._zones[number]) if number is not None else f"zone {path}"

    def absent(self, zones: Iterable[int]) -> list[str]:
        """Names of those of the zones that can't be asked."""
        return [repr(self._zones[z]) for z in zones if z not in self.here]
