"""What a store's zones say of themselves: superblocks, initialisation, their epoch records. FORMAT.md, "Zones and
epochs"; which epoch counts is in epochs.py."""

import logging
import os
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Final, NamedTuple

from objstore.backend.base import Backend, ZoneFailed
from objstore.backend.directory import DirectoryBackend
from objstore.clock import Clock
from objstore.errors import FormatError, InvalidRequest, NewerFormat, NotFound, StoreError
from objstore.format.document import Epoch, Known, Superblock, decode_document, encode_document
from objstore.names import object_number
from objstore.replica.membership import EPOCH_FOLDER, epoch_name

log = logging.getLogger(__name__)

SUPERBLOCK: Final = "superblock"
EPOCHS_KEPT: Final = 64
ZONES_MAX: Final = 64
TOP_NAMES: Final = frozenset({SUPERBLOCK, "epoch", "catalog", "log", "checkpoint", "scrub", "recovery"})
"""What lies directly in a zone."""
FEATURES: Final = frozenset({"membership"})
"""What every store needs a program to know: epoch records that describe their members."""


class ZonePlace(NamedTuple):
    """A zone about to be opened: its backend, where it is (for messages), its superblock (None = empty)."""

    backend: Backend
    path: str
    superblock: Superblock | None


def read_superblock(backend: Backend, path: str) -> Superblock | None:
    """The superblock of a zone; None if the zone is empty. FormatError: damaged, missing in a zone, or newer.
    InvalidRequest: the directory holds something else."""
    try:
        data = backend.get(SUPERBLOCK)
    except NotFound:
        data = b""
    if data:
        return decode_document("superblock", data, Superblock, f"{path}/{SUPERBLOCK}")
    names = list(backend.foreign_names(frozenset())) if isinstance(backend, DirectoryBackend) else []
    foreign = [name for name in names if name not in TOP_NAMES]
    if names and not foreign:
        raise FormatError(f"{path}/{SUPERBLOCK} is missing or empty, but the directory is not")
    if foreign:
        shown = ", ".join(foreign[:3]) + (", ..." if len(foreign) > 3 else "")
        raise InvalidRequest(
            f"{path} is neither empty nor a zone of Sheepfold (it holds {shown}); give an empty directory"
        )
    return None


def look_at_zones(backends: Sequence[tuple[Backend, str]]) -> tuple[list[ZonePlace], dict[str, str]]:
    """(the zones in the order given, path -> why that zone can't be used). InvalidRequest: refused. NewerFormat: that
    is all that can be read (the version is not under the checksum, so one zone alone may be damaged)."""
    newer: NewerFormat | None = None
    places: list[ZonePlace] = []
    unusable: dict[str, str] = {}
    for backend, path in backends:
        try:
            places.append(ZonePlace(backend, path, read_superblock(backend, path)))
        except (FormatError, ZoneFailed) as error:
            newer = error if isinstance(error, NewerFormat) else newer
            unusable[path] = str(error)
    if newer is not None and not any(place.superblock is not None for place in places):
        raise newer
    return places, unusable


def lock_zones(places: Sequence[ZonePlace], note: str) -> None:
    """Take every zone's lock. Busy, naming the holder: another process has one; those taken are given back."""
    for place in places:
        place.backend.lock(note)


def initialise(places: Sequence[ZonePlace], rng: random.Random, clock: Clock) -> list[ZonePlace]:
    """Make a new store of zones that are empty (or were left by an initialisation that did not finish)."""
    if len(places) > ZONES_MAX:
        raise InvalidRequest(f"{len(places)} zones are too many: a store has at most {ZONES_MAX}")
    store = rng.randbytes(16).hex()
    members = [Known(number, rng.randbytes(16).hex(), place.path) for number, place in enumerate(places)]
    made = []
    for member, place in zip(members, places, strict=True):
        block = Superblock(
            store=store,
            zone=member.id,
            number=member.number,
            members=members,
            created=clock.wall(),
            features_read=sorted(FEATURES),
        )
        place.backend.put(SUPERBLOCK, encode_document("superblock", block))
        made.append(place._replace(superblock=block))
    return made


def unfinished(places: Sequence[ZonePlace]) -> bool:
    """Whether nothing was ever stored in these zones: no epoch record in any that has a superblock."""
    return not any(place.backend.list(EPOCH_FOLDER) for place in places if place.superblock is not None)


def check_one_store(places: Sequence[ZonePlace]) -> None:
    """See that these zones are distinct ones of one store, in a format that can be written. InvalidRequest, FormatError
    by name."""
    first = places[0]
    assert first.superblock is not None
    by_id: dict[str, ZonePlace] = {}
    for place in places:
        block = place.superblock
        assert block is not None
        unknown = sorted({*block.features_read, *block.features_write} - FEATURES)
        if unknown:
            raise FormatError(f"{place.path} needs features that this program does not know: {', '.join(unknown)}")
        lacking = sorted(FEATURES - {*block.features_read})
        if lacking:
            raise FormatError(f"{place.path} is of a trial version without: {', '.join(lacking)}; make a new store")
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


def read_epochs(place: ZonePlace) -> tuple[list[Epoch], dict[int, FormatError]]:
    """Every epoch record of a zone, and what is wrong with those that can't be read, by number."""
    found: list[Epoch] = []
    damaged: dict[int, FormatError] = {}
    for entry in place.backend.list(EPOCH_FOLDER):
        number = object_number(entry.name)
        if number is None:
            continue
        try:
            data = place.backend.get(entry.name)
            found.append(decode_document("epoch", data, Epoch, f"{place.path}/{entry.name}"))
        except FormatError as error:
            log.warning("an epoch record is damaged: %s", error)
            damaged[number] = error
    return found, damaged


def heal(held: dict[str, list[Epoch]], damaged: Mapping[str, Mapping[int, FormatError]]) -> list[str]:
    """Give zones the records that they hold and that can't be read there: a record appears whole or not at all, so what
    is there was there, and what it says another zone tells. Returns the zones of whose newest record nobody knows what
    it says: they can't be judged and are taken from `held`. NewerFormat: a record may be of another program, and nobody
    has a copy that tells otherwise."""
    lost = []
    known = [epoch for epochs in held.values() for epoch in epochs]
    for zone, numbers in damaged.items():
        for number, error in numbers.items():
            said = {epoch.id: epoch for epoch in known if epoch.number == number}
            if len(said) == 1:
                held[zone] += said.values()
            elif isinstance(error, NewerFormat):
                raise error
            elif number > max((epoch.number for epoch in held[zone]), default=0):
                lost.append(zone)
    for zone in lost:
        held.pop(zone, None)
    return lost


def drop_old_epochs(backend: Backend, oldest: int, chain: Collection[str]) -> None:
    """In a zone's thread: remove records below number `oldest` beyond the newest EPOCHS_KEPT, and those that are not in
    the chain of the epoch in force: what they wanted never came, or was overruled."""
    entries = [(number, e.name) for e in backend.list(EPOCH_FOLDER) if (number := object_number(e.name)) is not None]
    for number, name in entries[:-EPOCHS_KEPT]:
        if number < oldest:
            backend.delete(name)
    for _, name in entries[-EPOCHS_KEPT:]:
        try:
            epoch = decode_document("epoch", backend.get(name), Epoch, name)
        except FormatError:
            continue
        if epoch.id not in chain:
            backend.delete(name)


def note_members(places: Sequence[ZonePlace], members: list[Known]) -> None:
    """Note in every superblock which zones there are and where, if it says something else. A superblock is only a
    hint of where the others are, so a zone that can't be written now is passed over."""
    for place in places:
        block = place.superblock
        assert block is not None
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
            try:
                place.backend.put(SUPERBLOCK, encode_document("superblock", moved))
            except StoreError as error:
                log.warning("superblock not renewed: %s", error)


def give_epochs(backend: Backend, epochs: Sequence[Epoch]) -> None:
    """In a zone's thread: put these records there, for zones that will have to know the past."""
    for epoch in epochs:
        backend.put(epoch_name(epoch.number), encode_document("epoch", epoch))


def absolute(path: str | os.PathLike[str]) -> str:
    """The path as messages and superblocks name it."""
    return os.path.abspath(os.fspath(path))
