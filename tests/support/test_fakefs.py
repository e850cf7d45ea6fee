"""The fake file system against its own model, and against the real one where that can be asked."""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from objstore.backend.filesystem import OS_FILE_SYSTEM, FileSystem
from tests.support.fakefs import BLOCK_BYTES, NAME_CHANGES_MAX, SECTOR_BYTES, Crash, FakeFileSystem

READ = os.O_RDONLY | os.O_CLOEXEC
WRITE = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
SEEDS = range(200)


def put(fs: FileSystem, fd: int, data: bytes, offset: int = 0, flags: int = 0) -> int:
    return fs.pwritev(fd, [memoryview(data)], offset, flags)


def sync_folder(fs: FileSystem, path: str) -> None:
    fd = fs.open(path, FOLDER)
    fs.fsync(fd)
    fs.close(fd)


def durable_file(fs: FakeFileSystem, path: str, data: bytes) -> int:
    fd = fs.open(path, WRITE)
    put(fs, fd, data)
    fs.fsync(fd)
    sync_folder(fs, "/")
    return fd


def exists(fs: FakeFileSystem, path: str) -> bool:
    try:
        fs.content(path)
    except OSError:
        return False
    return True


def outcomes(act: Callable[[FakeFileSystem], Callable[[FakeFileSystem], Any]]) -> list[Any]:
    """What act's observer sees after a power cut, once per seed."""
    seen = []
    for seed in SEEDS:
        fs = FakeFileSystem(rng=random.Random(seed))
        observe = act(fs)
        fs.crash("power")
        seen.append(observe(fs))
    return seen


# content


def test_synced_content_survives_and_unsynced_may_not() -> None:
    def act(fs: FakeFileSystem) -> Callable[[FakeFileSystem], Any]:
        fd = durable_file(fs, "/a", b"o" * 8192)
        put(fs, fd, b"n" * 4096)
        return lambda fs: fs.content("/a")

    seen = outcomes(act)
    assert b"o" * 8192 in seen
    assert b"n" * 4096 + b"o" * 4096 in seen
    torn = [content for content in seen if len(set(content[:4096])) == 2]
    assert torn
    for content in seen:
        assert content[4096:] == b"o" * 4096
        for at in range(0, 4096, SECTOR_BYTES):
            assert len(set(content[at : at + SECTOR_BYTES])) == 1, "a sector is whole"


def test_fdatasync_makes_content_and_size_durable() -> None:
    def act(fs: FakeFileSystem) -> Callable[[FakeFileSystem], Any]:
        fd = durable_file(fs, "/a", b"")
        put(fs, fd, b"x" * 3000, 1000)
        fs.fdatasync(fd)
        return lambda fs: fs.content("/a")

    assert set(outcomes(act)) == {bytes(1000) + b"x" * 3000}


def test_durable_write_covers_its_sectors_alone() -> None:
    def act(fs: FakeFileSystem) -> Callable[[FakeFileSystem], Any]:
        fd = durable_file(fs, "/a", b"o" * 16384)
        put(fs, fd, b"1" * 8192)
        put(fs, fd, b"D" * 4096, 6144, os.RWF_DSYNC)
        put(fs, fd, b"2" * 4096, 12288)
        return lambda fs: fs.content("/a")

    seen = outcomes(act)
    assert all(content[6144:10240] == b"D" * 4096 for content in seen)
    assert {content[:512] for content in seen} == {b"o" * 512, b"1" * 512}
    assert {content[12288:12800] for content in seen} == {b"o" * 512, b"2" * 512}


def test_durable_write_on_a_clean_file_stays_under_later_writes() -> None:
    def act(fs: FakeFileSystem) -> Callable[[FakeFileSystem], Any]:
        fd = durable_file(fs, "/a", b"")
        put(fs, fd, b"D" * 1000, 0, os.RWF_DSYNC)
        put(fs, fd, b"x" * 100, 100)
        return lambda fs: fs.content("/a")

    assert set(outcomes(act)) == {b"D" * 1000, b"D" * 100 + b"x" * 100 + b"D" * 800}


def test_a_sector_holds_all_writes_up_to_one_of_them() -> None:
    def act(fs: FakeFileSystem) -> Callable[[FakeFileSystem], Any]:
        fd = durable_file(fs, "/a", b"...." * 128)
        for index in range(4):
            put(fs, fd, b"%d" % index, index)
        return lambda fs: fs.content("/a")[:4]

    assert set(outcomes(act)) == {b"....", b"0...", b"01..", b"012.", b"0123"}


def test_size_and_content_are_independent() -> None:
    def act(fs: FakeFileSystem) -> Callable[[FakeFileSystem], Any]:
        fd = durable_file(fs, "/a", b"")
        put(fs, fd, b"x" * 512)
        put(fs, fd, b"y" * 512, 512)
        return lambda fs: fs.content("/a")

    x, y, none = b"x" * 512, b"y" * 512, bytes(512)
    assert set(outcomes(act)) == {b"", x, none, x + y, x + none, none + y, none + none}


def test_truncate_is_in_order_with_writes() -> None:
    def act(fs: FakeFileSystem) -> Callable[[FakeFileSystem], Any]:
        fd = durable_file(fs, "/a", b"o" * 512)
        put(fs, fd, b"1" * 512)
        fs.ftruncate(fd, 100)
        put(fs, fd, b"2", 511)
        return lambda fs: fs.content("/a")

    seen = set(outcomes(act))
    assert b"o" * 512 in seen
    assert b"1" * 100 + bytes(411) + b"2" in seen
    for content in seen:
        if content[511:] == b"2":
            assert content == b"1" * 100 + bytes(411) + b"2", "the sector as it stood after the third write"
        assert set(content) <= set(b"o12\0")


def test_unwritten_space_reads_as_zeros_and_reused_space_does_not() -> None:
    fs = FakeFileSystem()
    fd = fs.open("/a", WRITE)
    fs.posix_fallocate(fd, 0, 8192)
    data = bytearray(b"?" * 10000)
    assert fs.preadv(fd, [memoryview(data)], 0) == 8192
    assert data == bytes(8192) + b"?" * 1808
    fs.fsync(fd)
    put(fs, fd, b"former life")
    fs.fsync(fd)
    fs.rename("/a", "/b")
    sync_folder(fs, "/")
    fs.crash("power")
    assert fs.content("/b") == b"former life" + bytes(8192 - 11)


# names


def test_a_synced_file_without_a_synced_name_may_be_gone() -> None:
    def act(fs: FakeFileSystem) -> Callable[[FakeFileSystem], Any]:
        fd = fs.open("/a", WRITE)
        put(fs, fd, b"x")
        fs.fsync(fd)
        return lambda fs: fs.content("/a") if exists(fs, "/a") else None

    assert set(outcomes(act)) == {None, b"x"}


def test_a_synced_name_survives_with_whatever_content() -> None:
    def act(fs: FakeFileSystem) -> Callable[[FakeFileSystem], Any]:
        put(fs, fs.open("/a", WRITE), b"x")
        sync_folder(fs, "/")
        return lambda fs: fs.content("/a")

    assert set(outcomes(act)) == {b"", b"\0", b"x"}


def test_rename_is_whole_and_in_order() -> None:
    def act(fs: FakeFileSystem) -> Callable[[FakeFileSystem], Any]:
        fs.make_folder("/one")
        fs.make_folder("/two")
        durable_file(fs, "/a", b"x")
        fs.rename("/a", "/one/b")
        fs.rename("/one/b", "/two/c")
        return lambda fs: [path for path in ("/a", "/one/b", "/two/c") if exists(fs, path)]

    seen = outcomes(act)
    assert all(len(places) == 1 for places in seen), "always exactly one name"
    assert {places[0] for places in seen} == {"/a", "/one/b", "/two/c"}


def test_rename_over_a_file_leaves_the_old_or_the_new() -> None:
    def act(fs: FakeFileSystem) -> Callable[[FakeFileSystem], Any]:
        durable_file(fs, "/a", b"old")
        durable_file(fs, "/tmp", b"new")
        fs.rename("/tmp", "/a")
        return lambda fs: (fs.content("/a"), exists(fs, "/tmp"))

    assert set(outcomes(act)) == {(b"old", True), (b"new", False)}


def test_changes_of_different_names_have_no_order() -> None:
    def act(fs: FakeFileSystem) -> Callable[[FakeFileSystem], Any]:
        for name in "ab":
            fs.close(fs.open(f"/{name}", WRITE))
        return lambda fs: (exists(fs, "/a"), exists(fs, "/b"))

    assert set(outcomes(act)) == {(False, False), (True, False), (False, True), (True, True)}


def test_syncing_a_new_folder_does_not_make_its_own_name_durable() -> None:
    def act(fs: FakeFileSystem, up: bool) -> Callable[[FakeFileSystem], Any]:
        fs.mkdir("/f")
        durable_file(fs, "/a", b"x")
        fs.mkdir("/f/g")
        fs.link("/a", "/f/g/b")
        sync_folder(fs, "/f/g")
        if up:
            sync_folder(fs, "/f")
            sync_folder(fs, "/")
        return lambda fs: exists(fs, "/f/g/b")

    assert set(outcomes(lambda fs: act(fs, up=False))) == {False, True}
    assert set(outcomes(lambda fs: act(fs, up=True))) == {True}


def test_syncing_a_folder_brings_what_its_changes_build_on() -> None:
    def act(fs: FakeFileSystem) -> Callable[[FakeFileSystem], Any]:
        fs.make_folder("/one")
        fs.make_folder("/two")
        fs.close(fs.open("/one/a", WRITE))
        fs.rename("/one/a", "/two/b")
        sync_folder(fs, "/two")
        return lambda fs: (exists(fs, "/one/a"), exists(fs, "/two/b"))

    assert set(outcomes(act)) == {(False, True)}


def test_a_removed_folder_loses_no_file_that_was_moved_out() -> None:
    def act(fs: FakeFileSystem, sync: bool) -> Callable[[FakeFileSystem], Any]:
        fs.make_folder("/f")
        durable_file(fs, "/a", b"x")
        fs.link("/a", "/f/b")
        sync_folder(fs, "/f")
        fs.unlink("/a")
        sync_folder(fs, "/")
        fs.rename("/f/b", "/c")
        fs.rmdir("/f")
        if sync:
            sync_folder(fs, "/")
        return lambda fs: (exists(fs, "/f/b"), exists(fs, "/c"))

    assert set(outcomes(lambda fs: act(fs, sync=False))) == {(True, False), (False, True)}
    assert set(outcomes(lambda fs: act(fs, sync=True))) == {(False, True)}


def test_an_unlinked_file_may_come_back_with_what_was_durable() -> None:
    def act(fs: FakeFileSystem) -> Callable[[FakeFileSystem], Any]:
        fs.close(durable_file(fs, "/a", b"x" * 512))
        fs.unlink("/a")
        return lambda fs: fs.content("/a") if exists(fs, "/a") else None

    assert set(outcomes(act)) == {None, b"x" * 512}


def test_the_list_of_unsynced_names_is_bounded() -> None:
    def act(fs: FakeFileSystem) -> Callable[[FakeFileSystem], Any]:
        for number in range(NAME_CHANGES_MAX + 3):
            fs.close(fs.open(f"/{number}", WRITE))
        return lambda fs: [exists(fs, f"/{number}") for number in range(4)]

    seen = outcomes(act)
    assert all(found[:3] == [True] * 3 for found in seen)
    assert {found[3] for found in seen} == {False, True}


# kill, descriptors, locks


def test_kill_keeps_what_was_written_and_what_is_unsynced() -> None:
    fs = FakeFileSystem(rng=random.Random(1))
    fd = fs.open("/a", WRITE)
    put(fs, fd, b"x" * 600)
    fs.crash("kill")
    assert fs.content("/a") == b"x" * 600
    assert fs.unsynced_bytes() == 600
    assert set(outcomes(_killed_first)) == {None, b"", bytes(3), b"abc"}


def _killed_first(fs: FakeFileSystem) -> Callable[[FakeFileSystem], Any]:
    put(fs, fs.open("/a", WRITE), b"abc")
    fs.crash("kill")
    return lambda fs: fs.content("/a") if exists(fs, "/a") else None


@pytest.mark.parametrize("mode", ["kill", "power"])
def test_descriptors_and_locks_die(mode: str) -> None:
    fs = FakeFileSystem()
    fd = durable_file(fs, "/a", b"x")
    fs.lock_exclusive(fd)
    other = fs.open("/a", READ)
    assert fs.is_locked(other)
    with pytest.raises(BlockingIOError):
        fs.lock_exclusive(other)
    fs.crash(mode)
    assert fs.open_count() == 0
    for dead in (fd, other):
        with pytest.raises(OSError, match="Bad file descriptor"):
            put(fs, dead, b"x")
    again = fs.open("/a", READ)
    assert again not in (fd, other)
    assert not fs.is_locked(again)
    fs.lock_exclusive(again)


def test_a_lock_ends_with_its_descriptor() -> None:
    fs = FakeFileSystem()
    first, second = fs.open("/a", WRITE), fs.open("/a", WRITE)
    fs.lock_exclusive(first)
    assert not fs.is_locked(first)
    fs.close(first)
    assert not fs.is_locked(second)
    fs.lock_exclusive(second)


# errors


def _fail_next(fs: FakeFileSystem, call: str, error: BaseException) -> None:
    def hook(name: str, args: tuple[Any, ...]) -> int | None:
        if name == call:
            fs.before_call = None
            raise error
        return None

    fs.before_call = hook


@pytest.mark.parametrize("call", ["fsync", "fdatasync"])
def test_after_a_failed_sync_the_cache_lies(call: str) -> None:
    survived = set()
    for seed in SEEDS:
        fs = FakeFileSystem(rng=random.Random(seed))
        fd = durable_file(fs, "/a", b"o" * 1024)
        put(fs, fd, b"n" * 1024)
        _fail_next(fs, call, OSError(errno.EIO, "injected"))
        with pytest.raises(OSError, match="injected"):
            getattr(fs, call)(fd)
        fs.fsync(fd)
        assert fs.content("/a") == b"n" * 1024, "readers see the new bytes"
        direct = fs.reopen(fd, READ | os.O_DIRECT)
        truth = bytearray(1024)
        fs.preadv(direct, [memoryview(truth)], 0)
        put(fs, fd, b"later", 2048)
        fs.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert fs.content("/a") == truth + bytes(1024) + b"later", "clean pages are gone, dirty ones stay"
        fs.fdatasync(fd)
        fs.crash("power")
        assert fs.content("/a") == truth + bytes(1024) + b"later"
        survived.add(bytes(truth[::512]))
    assert survived == {b"oo", b"on", b"no", b"nn"}


def test_a_crash_goes_on_until_it_is_played() -> None:
    fs = FakeFileSystem()
    fd = fs.open("/a", WRITE)
    _fail_next(fs, "pwritev", Crash())
    for _ in range(3):
        with pytest.raises(Crash):
            put(fs, fd, b"x")
        with pytest.raises(Crash):
            fs.close(fd)
    assert fs.counts["pwritev"] == 1, "calls of the dead do not count"
    fs.crash("kill")
    assert fs.content("/a") == b""


@pytest.mark.parametrize("kind", ["crash", "error"])
def test_a_write_may_be_half_done(kind: str) -> None:
    fs = FakeFileSystem()
    fd = fs.open("/a", WRITE)
    error: BaseException = Crash(applied_bytes=700)
    if kind == "error":
        error = OSError(errno.EIO, "injected")
        error.applied_bytes = 700  # type: ignore[attr-defined]
    _fail_next(fs, "pwritev", error)
    with pytest.raises(type(error)):
        put(fs, fd, b"x" * 1000, 10)
    fs.crash("kill")
    assert fs.content("/a") == bytes(10) + b"x" * 700


def test_hook_limits_transfers_and_sees_calls() -> None:
    fs = FakeFileSystem()
    fd = fs.open("/a", WRITE)
    put(fs, fd, b"0123456789")
    calls = []

    def hook(name: str, args: tuple[Any, ...]) -> int | None:
        calls.append((name, args[0]))
        return 4

    fs.before_call = hook
    assert put(fs, fd, b"abcdefgh") == 4
    data = bytearray(10)
    assert fs.preadv(fd, [memoryview(data)[:3], memoryview(data)[3:]], 1) == 4
    assert data == b"bcd4" + bytes(6)
    assert calls == [("pwritev", fd), ("preadv", fd)]
    assert fs.path_of(fd) == "/a"
    assert fs.counts["pwritev"] == 2


# space


def test_space_runs_out() -> None:
    fs = FakeFileSystem(capacity_bytes=4 * BLOCK_BYTES)
    fd = fs.open("/a", WRITE)
    with pytest.raises(OSError, match="No space left"):
        fs.posix_fallocate(fd, 0, 5 * BLOCK_BYTES)
    fs.posix_fallocate(fd, 0, 2 * BLOCK_BYTES)
    assert fs.fstatvfs(fd).f_bavail == 2
    other = fs.open("/b", WRITE)
    assert put(fs, other, bytes(3 * BLOCK_BYTES)) == 2 * BLOCK_BYTES, "a short write fills the disk"
    with pytest.raises(OSError, match="No space left"):
        put(fs, other, b"x", 2 * BLOCK_BYTES)
    assert put(fs, fd, b"x" * 2 * BLOCK_BYTES) == 2 * BLOCK_BYTES, "allocated space is ours"
    fs.ftruncate(fd, 1)
    assert fs.fstatvfs(fd).f_bavail == 1
    fs.unlink("/b")
    assert fs.fstatvfs(fd).f_bavail == 1, "an open file keeps its space"
    fs.close(other)
    assert fs.fstatvfs(fd).f_bavail == 3
    assert fs.fstat(fd).st_blocks * 512 == BLOCK_BYTES
    fs.crash("kill")
    assert fs.taken_bytes == BLOCK_BYTES


def test_space_of_the_forgotten_is_free_after_a_crash() -> None:
    fs = FakeFileSystem(capacity_bytes=4 * BLOCK_BYTES, rng=random.Random(0))
    fd = durable_file(fs, "/a", b"x" * BLOCK_BYTES)
    other = fs.open("/b", WRITE)
    put(fs, other, bytes(3 * BLOCK_BYTES))
    fs.unlink("/b")
    fs.crash("kill")
    assert fs.taken_bytes == BLOCK_BYTES
    with pytest.raises(OSError, match="Bad file"):
        fs.fstat(fd)


# abilities


def test_refusals_use_the_errnos_of_linux() -> None:
    fs = FakeFileSystem(takes_nowait=False, takes_dsync=False, takes_direct=False, takes_fallocate=False)
    fd = fs.open("/a", WRITE)
    data = memoryview(bytearray(1))
    for code, call in (
        (errno.EOPNOTSUPP, lambda: fs.preadv(fd, [data], 0, os.RWF_NOWAIT)),
        (errno.EOPNOTSUPP, lambda: fs.pwritev(fd, [data], 0, os.RWF_DSYNC)),
        (errno.EOPNOTSUPP, lambda: fs.posix_fallocate(fd, 0, 1)),
        (errno.EINVAL, lambda: fs.reopen(fd, READ | os.O_DIRECT)),
    ):
        with pytest.raises(OSError, match=os.strerror(code)) as caught:
            call()
        assert caught.value.errno == code


def test_nowait_misses_by_chance() -> None:
    def run(seed: int) -> list[bool]:
        fs = FakeFileSystem(rng=random.Random(seed), nowait_miss=0.5)
        fd = fs.open("/a", WRITE)
        put(fs, fd, b"x")
        hits = []
        for _ in range(40):
            try:
                hits.append(fs.preadv(fd, [memoryview(bytearray(1))], 0, os.RWF_NOWAIT) == 1)
            except BlockingIOError:
                hits.append(False)
        return hits

    assert run(1) == run(1) != run(2)
    assert 5 < sum(run(1)) < 35


def test_direct_reads_are_aligned() -> None:
    fs = FakeFileSystem()
    fd = durable_file(fs, "/a", b"x" * 1000)
    direct = fs.reopen(fd, READ | os.O_DIRECT)
    with pytest.raises(OSError, match="Invalid argument"):
        fs.preadv(direct, [memoryview(bytearray(100))], 0)
    assert fs.preadv(direct, [memoryview(bytearray(1024))], 0) == 1000


# the real one


class Twin:
    """The same calls to a directory of the host and to the fake; both must answer alike."""

    def __init__(self, root: Path) -> None:
        self._real_root = os.open(root, FOLDER)
        self._fake = FakeFileSystem()
        self._fake_root = self._fake.open("/", FOLDER)
        self.fds: list[tuple[int, int]] = []

    def names(self, call: str, *paths: str) -> None:
        suffix = ("src_dir_fd", "dst_dir_fd") if len(paths) == 2 else ("dir_fd",)
        self._both(
            lambda fs, root, _: getattr(fs, call)(*paths, **dict.fromkeys(suffix, root)),
        )

    def open(self, path: str, flags: int) -> None:
        real = self._answer(lambda: OS_FILE_SYSTEM.open(path, flags, dir_fd=self._real_root))
        fake = self._answer(lambda: self._fake.open(path, flags, dir_fd=self._fake_root))
        assert isinstance(real[1], int) == isinstance(fake[1], int), (path, flags, real, fake)
        if real[0] == "error":
            assert real == fake, (path, flags)
        else:
            self.fds.append((real[1], fake[1]))

    def close(self, index: int) -> None:
        real, fake = self.fds.pop(index)
        OS_FILE_SYSTEM.close(real)
        self._fake.close(fake)

    def on(self, index: int, act: Callable[[FileSystem, int], object]) -> None:
        self._both(lambda fs, _, fd: act(fs, fd), self.fds[index])

    def tree(self, folder: str = ".") -> None:
        """Names, sizes, link counts and contents below the folder."""

        def look(fs: FileSystem, root: int, _: int) -> list[Any]:
            fd = fs.open(folder, FOLDER, dir_fd=root)
            found = []
            for name in sorted(fs.listdir(fd)):
                status = fs.stat(f"{folder}/{name}", dir_fd=root, follow_symlinks=False)
                is_folder = status.st_mode & 0o170000 == 0o040000
                found.append((name, "folder" if is_folder else (status.st_size, status.st_nlink)))
            fs.close(fd)
            return found

        self._both(look)

    def finish(self) -> None:
        while self.fds:
            self.close(0)
        OS_FILE_SYSTEM.close(self._real_root)

    def _both(self, act: Callable[[FileSystem, int, int], object], fds: tuple[int, int] = (-1, -1)) -> None:
        real = self._answer(lambda: act(OS_FILE_SYSTEM, self._real_root, fds[0]))
        fake = self._answer(lambda: act(self._fake, self._fake_root, fds[1]))
        assert real == fake

    @staticmethod
    def _answer(call: Callable[[], Any]) -> tuple[str, Any]:
        try:
            return "value", call()
        except OSError as error:
            return "error", str(errno.errorcode[error.errno or 0])


@pytest.mark.parametrize("seed", range(12))
def test_answers_like_the_real_file_system(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    twin = Twin(tmp_path)
    folders = [".", "d", "e", "d/f"]
    paths = [f"{folder}/{name}" for folder in folders for name in "xyz"]

    def read(fs: FileSystem, fd: int, offset: int, lengths: list[int]) -> tuple[int, list[bytes]]:
        parts = [bytearray(b"?" * length) for length in lengths]
        return fs.preadv(fd, [memoryview(part) for part in parts], offset), [bytes(part) for part in parts]

    for step in range(400):
        choice = rng.randrange(12)
        path, other = rng.choice(paths), rng.choice(paths)
        index = rng.randrange(len(twin.fds)) if twin.fds else None
        if choice == 0:
            twin.open(path, WRITE | rng.choice((0, os.O_EXCL)))
        elif choice == 1:
            twin.open(rng.choice((path, rng.choice(folders), "x/y")), rng.choice((READ, FOLDER)))
        elif choice == 2:
            twin.names("mkdir", rng.choice(folders))
        elif choice == 3 and not step % 3:
            twin.names("rmdir", rng.choice([*folders[1:], path]))
        elif choice == 4:
            twin.names("rename", path, other)
        elif choice == 5:
            twin.names("link", path, other)
        elif choice == 6:
            twin.names("unlink", rng.choice((path, path, "d")))
        elif choice == 7:
            twin.tree(rng.choice(folders[:3]) if rng.random() < 0.5 else ".")
        elif index is None:
            continue
        elif choice == 8:
            offset, data = rng.randrange(9000), rng.randbytes(rng.randrange(6000))
            flags = rng.choice((0, os.RWF_DSYNC))
            twin.on(
                index,
                lambda fs, fd, offset=offset, data=data, flags=flags: fs.pwritev(
                    fd, [memoryview(data)[:7], memoryview(data)[7:]], offset, flags
                ),
            )
        elif choice == 9:
            offset, lengths = rng.randrange(12000), [rng.randrange(4000) for _ in range(rng.randrange(1, 4))]
            twin.on(index, lambda fs, fd, offset=offset, lengths=lengths: read(fs, fd, offset, lengths))
        elif choice == 10:
            size = rng.randrange(1, 12000)
            resize = rng.choice(("ftruncate", "posix_fallocate"))
            arguments = (size,) if resize == "ftruncate" else (0, size)
            twin.on(
                index,
                lambda fs, fd, resize=resize, arguments=arguments: getattr(fs, resize)(fd, *arguments),
            )
        elif len(twin.fds) > 6:
            twin.close(index)
    twin.tree()
    twin.finish()


def test_one_seed_one_result() -> None:
    def run(seed: int) -> list[bytes]:
        rng = random.Random(seed)
        fs = FakeFileSystem(rng=rng)
        fs.make_folder("/zone")
        for turn in range(30):
            fd = fs.open(f"/zone/{turn % 7}", WRITE)
            for _ in range(5):
                put(fs, fd, rng.randbytes(1500), rng.randrange(8000))
            if turn % 3 == 0:
                fs.fdatasync(fd)
            if turn % 5 == 0:
                sync_folder(fs, "/zone")
            if turn % 10 == 9:
                fs.crash("power")
        return [fs.content(f"/zone/{name}") if exists(fs, f"/zone/{name}") else b"-" for name in range(7)]

    assert run(3) == run(3)
    assert run(3) != run(4)
