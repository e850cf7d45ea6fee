"""The directories that are zones: which belong to one store, where they were last seen, who has them open."""

import os
from collections.abc import Sequence
from pathlib import Path

from objstore.backend.directory import DirectoryBackend
from objstore.errors import NotFound, StoreError
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


def _check_directory(path: str) -> None:
    if not os.path.isdir(path):
        raise NotFound(f"{path} is no directory")


def zone_paths(zone: Path | str) -> list[Path]:
    """The directories of all zones of the store that this one belongs to. NotFound: it belongs to none."""
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
    """The note of the process that has this zone's store open; None if nobody has. NotFound: no such directory."""
    path = absolute(zone)
    _check_directory(path)
    backend = DirectoryBackend(path)
    try:
        return backend.lock_note()
    finally:
        backend.close()
