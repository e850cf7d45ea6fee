"""Which zones make up a store: superblocks, initialisation, epochs. FORMAT.md, "Zones and epochs".

Every start writes a fresh epoch, naming its parent, before any data is touched. An epoch is complete when every member
holds it. For now a store opens only with all its members present, so the newest complete epoch is the newest epoch that
every zone holds.
"""

import logging
import os
import random
from collections.abc import Sequence
from typing import Final, NamedTuple

from objstore.backend.base import Backend
from objstore.backend.directory import DirectoryBackend
from objstore.clock import Clock
from objstore.errors import Corrupt, FormatError, InvalidRequest, NewerFormat, NotFound, Unavailable
from objstore.format.document import (
    CatalogHead,
    Epoch,
    Member,
    Superblock,
    decode_document,
    encode_document,
)

log = logging.getLogger(__name__)

SUPERBLOCK: Final = "superblock"
EPOCH_FOLDER: Final = "epoch/"
KNOWN_NAMES: Final = frozenset({SUPERBLOCK, "epoch", "log", "checkpoint", "catalog"})
EPOCHS_KEPT: Final = 16
ZONES_MAX: Final = 64
NO_EPOCH: Final = "0" * 32


class ZonePlace(NamedTuple):
    """A zone about to be opened: its backend, where it is (for messages), its superblock (None = empty)."""

    backend: Backend
    path: str
    superblock: Superblock | None


def epoch_name(number: int) -> str:
    """Object name of an epoch record."""
    return f"{EPOCH_FOLDER}{number:08x}"


def read_superblock(backend: Backend, path: str) -> Superblock | None:
    """The superblock of a zone; None if the zone is empty. FormatError: foreign, damaged or newer."""
    try:
        data = backend.get(SUPERBLOCK)
    except NotFound:
        data = b""
    if data:
        return decode_document("superblock", data, Superblock, f"{path}/{SUPERBLOCK}")
    foreign = list(backend.foreign_names(frozenset())) if isinstance(backend, DirectoryBackend) else []
    if foreign:
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise InvalidRequest(
            f"{path} is neither empty nor a zone of Sheepfold (it holds {shown}); give an empty directory"
        )
    return None


def look_at_zones(backends: Sequence[tuple[Backend, str]]) -> list[ZonePlace]:
    """Superblocks of all zones given, in order."""
    return [ZonePlace(backend, path, read_superblock(backend, path)) for backend, path in backends]


def lock_zones(places: Sequence[ZonePlace], note: str) -> None:
    """Take every zone's lock. Busy, naming the holder: another process has one; those taken are given back."""
    for place in places:
        place.backend.lock(note)


def initialise(places: Sequence[ZonePlace], rng: random.Random, clock: Clock) -> list[ZonePlace]:
    """Make a new store of zones that are empty (or were left by an initialisation that did not finish)."""
    if len(places) > ZONES_MAX:
        raise InvalidRequest(f"{len(places)} zones are too many: a store has at most {ZONES_MAX}")
    store = rng.randbytes(16).hex()
    members = [Member(number, rng.randbytes(16).hex(), place.path) for number, place in enumerate(places)]
    made = []
    for member, place in zip(members, places, strict=True):
        block = Superblock(store=store, zone=member.id, number=member.number, members=members, created=clock.wall())
        place.backend.put(SUPERBLOCK, encode_document("superblock", block))
        made.append(place._replace(superblock=block))
    return made


def unfinished(places: Sequence[ZonePlace]) -> bool:
    """Whether nothing was ever stored in these zones: no epoch record in any that has a superblock."""
    return not any(place.backend.list(EPOCH_FOLDER) for place in places if place.superblock is not None)


def check_members(places: Sequence[ZonePlace]) -> list[ZonePlace]:
    """The zones in the order of their numbers, if they are exactly one store's. InvalidRequest, Unavailable by name."""
    first = places[0]
    assert first.superblock is not None
    by_id: dict[str, ZonePlace] = {}
    for place in places:
        block = place.superblock
        if block is None:
            raise InvalidRequest(
                f"{place.path} is empty, but {first.path} belongs to store {first.superblock.store[:8]}: "
                "give only the zones of one store"
            )
        unknown = sorted({*block.features_read, *block.features_write})
        if unknown:
            raise FormatError(f"{place.path} needs features that this program does not know: {', '.join(unknown)}")
        if block.store != first.superblock.store:
            raise InvalidRequest(
                f"{place.path} belongs to store {block.store[:8]}, but {first.path} to store "
                f"{first.superblock.store[:8]}: give only the zones of one store"
            )
        other = by_id.get(block.zone)
        if other is not None:
            raise InvalidRequest(
                f"{place.path} and {other.path} are the same zone {block.zone[:8]}: one is a copy of the other; "
                "remove the copy"
            )
        by_id[block.zone] = place
    missing = [member for member in first.superblock.members if member.id not in by_id]
    if missing:
        raise Unavailable("zones are missing: " + ", ".join(f"{m.path} (zone {m.id[:8]})" for m in missing))
    listed = {member.id for member in first.superblock.members}
    strangers = [place.path for zone_id, place in by_id.items() if zone_id not in listed]
    if strangers:
        raise InvalidRequest(f"{', '.join(strangers)} is not listed as a zone of store {first.superblock.store[:8]}")
    return sorted(places, key=lambda place: place.superblock.number if place.superblock else 0)


def newest_epoch(places: Sequence[ZonePlace]) -> tuple[Epoch | None, int]:
    """(the newest epoch that every zone holds, the highest number seen anywhere). None: a store just initialised.

    A record appears whole or not at all, so one that is there but damaged counts as held; what it said is read from
    another zone. Corrupt: no zone can say it. Going back to an older one would go back to an older catalog.
    """
    held: dict[int, list[Epoch | None]] = {}
    highest = 0
    for place in places:
        for entry in place.backend.list(EPOCH_FOLDER):
            number = int(entry.name.rpartition("/")[2], 16)
            highest = max(highest, number)
            epoch: Epoch | None = None
            data = place.backend.get(entry.name)
            try:
                epoch = decode_document("epoch", data, Epoch, f"{place.path}/{entry.name}")
            except NewerFormat:
                raise
            except FormatError as error:
                log.warning("an epoch record is damaged: %s", error)
            held.setdefault(number, []).append(epoch)
    for number, epochs in sorted(held.items(), reverse=True):
        readable = {epoch.id: epoch for epoch in epochs if epoch is not None}
        if len(epochs) < len(places) or len(readable) > 1:
            continue
        if not readable:
            raise Corrupt(f"no zone can read epoch record {number}")
        return next(iter(readable.values())), highest
    if any(epoch is not None and epoch.parent != NO_EPOCH for epochs in held.values() for epoch in epochs):
        raise Corrupt("no epoch record is held by every zone")
    return None, highest


def next_epoch(
    parent: Epoch | None, number: int, members: int, catalog: CatalogHead, rng: random.Random, wall: float
) -> Epoch:
    """The epoch of this start."""
    return Epoch(
        number=number,
        id=rng.randbytes(16).hex(),
        parent=parent.id if parent is not None else NO_EPOCH,
        members=list(range(members)),
        w=members,
        wall=wall,
        catalog=catalog,
    )


def write_epoch(place: ZonePlace, epoch: Epoch) -> None:
    """Put the epoch record into one zone, durably, and drop the oldest ones."""
    place.backend.put(epoch_name(epoch.number), encode_document("epoch", epoch))


def drop_old_epochs(place: ZonePlace) -> None:
    """Keep the newest EPOCHS_KEPT records; called when the newest is complete."""
    for entry in place.backend.list(EPOCH_FOLDER)[:-EPOCHS_KEPT]:
        place.backend.delete(entry.name)


def update_paths(places: Sequence[ZonePlace]) -> None:
    """Note in every superblock where the zones are now, if any was moved."""
    now = {place.superblock.zone: place.path for place in places if place.superblock is not None}
    for place in places:
        block = place.superblock
        assert block is not None
        members = [Member(m.number, m.id, now.get(m.id, m.path)) for m in block.members]
        if members != block.members:
            moved = Superblock(
                store=block.store,
                zone=block.zone,
                number=block.number,
                members=members,
                created=block.created,
                features_read=block.features_read,
                features_write=block.features_write,
                features_check=block.features_check,
            )
            place.backend.put(SUPERBLOCK, encode_document("superblock", moved))


def absolute(path: str | os.PathLike[str]) -> str:
    """The path as messages and superblocks name it."""
    return os.path.abspath(os.fspath(path))
