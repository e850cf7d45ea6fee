"""The directories that are zones: which belong to one store, where they were last seen, who has them open."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from objstore.backend.directory import DirectoryBackend
from objstore.errors import InvalidRequest, NotFound, StoreError, Unavailable
from objstore.format.document import Superblock
from objstore.replica.members import absolute, read_superblock


def other_zones(names: Sequence[str]) -> list[str]:
    """Directories of zones of the same store that were not given, as far as they are where they were last seen."""
    here: set[str] = set()
    hints: dict[str, str] = {}
    for path in names:
        block = superblock_at(path)
        if block is not None:
            here.add(block.zone)
            hints.update({member.id: member.path for member in block.members})
    others = []
    for zone, path in hints.items():
        if zone not in here and path not in names:
            block = superblock_at(path)
            if block is not None and block.zone == zone:
                others.append(path)
    return others


def superblock_at(path: str) -> Superblock | None:
    """What the directory says it is; None if that can't be read."""
    try:
        backend = DirectoryBackend(path)
    except StoreError:
        return None
    try:
        return read_superblock(backend, path)
    except StoreError:
        return None
    finally:
        backend.close()


def make_directories(paths: Sequence[str], made: list[str]) -> None:
    """Make those of the directories that are missing, if the others are empty: they may become a new store. Where one
    holds anything, a missing one is a zone of an existing store, and nobody is to find an empty one in its place.

    made: gets what was made, parents first. InvalidRequest: it can't be made.
    """
    there = [path for path in paths if os.path.isdir(path)]
    if not all(_is_empty(path) for path in there):
        return
    for path in paths:
        try:
            if path not in there and os.path.lexists(path):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            missing = []
            at = path
            while not os.path.lexists(at):
                missing.append(at)
                at = os.path.dirname(at)
            for each in reversed(missing):
                os.mkdir(each)
                made.append(each)
        except OSError as error:
            raise InvalidRequest(f"{path} can't be made a zone: {error.strerror}") from error


def _is_empty(path: str) -> bool:
    """Whether it is a directory in which a zone can be made; not if that can't be seen."""
    try:
        backend = DirectoryBackend(path)
    except StoreError:
        return False
    try:
        return read_superblock(backend, path) is None
    except StoreError:
        return False
    finally:
        backend.close()


def _check_directory(path: str) -> None:
    """Unavailable: a disk that is not mounted looks like that. NotFound: no store can be there."""
    if not os.path.lexists(path):
        raise Unavailable(f"the zone is missing: there is no directory {path}")
    if not os.path.isdir(path):
        raise NotFound(f"{path} is no directory")


def zone_paths(zone: Path | str) -> list[Path]:
    """The directories of all zones of the store that this one belongs to. NotFound: it belongs to none; Unavailable: it
    is not there."""
    path = absolute(zone)
    _check_directory(path)
    backend = DirectoryBackend(path)
    try:
        block = read_superblock(backend, path)
    finally:
        backend.close()
    if block is None:
        raise NotFound(f"{path} is no zone of a store")
    return [Path(path) if member.id == block.zone else Path(member.path) for member in block.members]


def lock_note(zone: Path | str) -> str | None:
    """The note of the process that has this zone's store open; None if nobody has. NotFound: it is no directory;
    Unavailable: it is not there."""
    path = absolute(zone)
    _check_directory(path)
    backend = DirectoryBackend(path)
    try:
        return backend.lock_note()
    finally:
        backend.close()
