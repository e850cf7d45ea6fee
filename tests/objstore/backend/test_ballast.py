"""Space kept back: given up for what asks for no reserve, never for clients' data; whole or not there; made again."""

import contextlib
import errno
import random

import pytest

from objstore.backend.ballast import ROOM_TIMES
from objstore.backend.directory import DirectoryBackend
from objstore.errors import NoSpace
from tests.support.fakefs import BLOCK_BYTES, FakeFileSystem

ZONE = "/zone"
BALLAST = 64 * BLOCK_BYTES
FILE = f"{ZONE}/spare/ballast"


def disk(blocks: int = 1024) -> FakeFileSystem:
    fake = FakeFileSystem(rng=random.Random(5), capacity_bytes=blocks * BLOCK_BYTES)
    fake.make_folder(ZONE)
    return fake


def open_zone(fs: FakeFileSystem, ballast_bytes: int = BALLAST) -> DirectoryBackend:
    backend = DirectoryBackend(ZONE, fs=fs, ballast_bytes=ballast_bytes)
    backend.lock("test")
    return backend


def fill(fs: FakeFileSystem, backend: DirectoryBackend, *, left_blocks: int = 0) -> None:
    """Another program takes what is free."""
    used = DirectoryBackend(ZONE, fs=fs)
    free = fs.capacity_bytes - fs.taken_bytes - left_blocks * BLOCK_BYTES
    used.create(f"other/{fs.taken_bytes}", free - 2 * BLOCK_BYTES).close()
    rest = fs.capacity_bytes - fs.taken_bytes - left_blocks * BLOCK_BYTES
    if rest >= BLOCK_BYTES:
        used.create(f"other/{fs.taken_bytes}", rest).close()
    used.close()


def ballast_size(backend: DirectoryBackend) -> int:
    return backend._fs.stat("spare/ballast", dir_fd=backend._root, follow_symlinks=False).st_size


def test_a_full_zone_still_takes_what_asks_for_no_reserve() -> None:
    fs = disk()
    backend = open_zone(fs)
    assert ballast_size(backend) == BALLAST
    fill(fs, backend)
    with pytest.raises(NoSpace):
        backend.create("log/1/data", 8 * BLOCK_BYTES, reserve_bytes=1)
    assert ballast_size(backend) == BALLAST, "kept for better use than clients' data"
    backend.create("log/1/tail", 8 * BLOCK_BYTES).close()
    backend.put("head", bytes(3 * BLOCK_BYTES))
    with pytest.raises(FileNotFoundError):
        ballast_size(backend)
    backend.close()


def test_a_put_finds_space() -> None:
    fs = disk()
    backend = open_zone(fs)
    fill(fs, backend, left_blocks=2)
    backend.put("head", bytes(20 * BLOCK_BYTES))
    assert backend.get("head") == bytes(20 * BLOCK_BYTES)
    backend.close()


def test_who_starts_on_a_full_disk_has_the_space_at_once() -> None:
    """Folders and names have no second attempt."""
    fs = disk()
    backend = open_zone(fs)
    fill(fs, backend)
    backend.close()
    again = open_zone(fs)
    assert again.free_bytes() >= BALLAST
    again.put("new/folder/head", bytes(100))
    again.close()


def test_it_is_made_again_when_there_is_room() -> None:
    fs = disk()
    backend = open_zone(fs)
    fill(fs, backend)
    backend.put("head", bytes(20 * BLOCK_BYTES))
    for entry in backend.list("other/"):
        backend.delete(entry.name)
    assert ballast_size(backend) == BALLAST
    backend.close()


def test_it_is_a_part_of_what_is_left_free_of_clients_data() -> None:
    """Keeping it back costs clients nothing."""
    fs = disk()
    reserve = 100 * BLOCK_BYTES
    without = DirectoryBackend(ZONE, fs=fs).free_bytes()
    backend = open_zone(fs)
    assert backend.free_bytes() > without - 8 * BLOCK_BYTES
    number = 0
    with contextlib.suppress(NoSpace):
        while number < 1000:
            backend.create(f"log/1/{number}", 8 * BLOCK_BYTES, reserve_bytes=reserve).close()
            number += 1
    assert reserve <= backend.free_bytes() < reserve + 12 * BLOCK_BYTES
    backend.close()


def test_there_is_none_where_it_would_take_all_that_is_free() -> None:
    fs = disk(blocks=int(ROOM_TIMES * 64))
    backend = open_zone(fs)
    with pytest.raises(FileNotFoundError):
        ballast_size(backend)
    backend.close()


def test_an_attempt_that_finds_no_space_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each deletion tries again: what they left would fill the disk."""
    fs = disk()
    backend = DirectoryBackend(ZONE, fs=fs, ballast_bytes=BALLAST)

    def no_space(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patched:
        patched.setattr(fs, "posix_fallocate", no_space)
        backend.lock("test")
        for _ in range(3):
            backend.put("head", bytes(10))
            backend.delete("head")
        assert list(backend._names_in("tmp")) == []
    backend.close()


def test_one_of_another_size_is_replaced_and_left_alone_by_nobody_else() -> None:
    fs = disk()
    open_zone(fs).close()
    backend = open_zone(fs, 2 * BALLAST)
    assert ballast_size(backend) == 2 * BALLAST
    backend.close()
    before = fs.taken_bytes
    backend = open_zone(fs, 2 * BALLAST)
    assert fs.taken_bytes == before
    assert backend.list("") == []
    backend.close()
