"""What DirectoryBackend adds to the contract: files, folders, locks, abilities, the spare pool, errors."""

import errno
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from objstore.backend.base import Backend, Entry, ZoneFailed
from objstore.backend.directory import DirectoryBackend
from objstore.backend.file_handle import FileHandle
from objstore.backend.filesystem import OS_FILE_SYSTEM, FileSystem
from objstore.backend.names import NAME_BYTES_MAX, NAME_PARTS_MAX, is_name
from objstore.backend.oserrors import translated
from objstore.errors import Busy, Exists, InvalidRequest, NoSpace, NotFound, StoreError
from tests.contract.backend_contract import views
from tests.support.fakefs import FakeFileSystem

ZONE = "/zone"
SIZE = 64 * 1024


@pytest.fixture
def fs() -> FakeFileSystem:
    fake = FakeFileSystem(rng=random.Random(5))
    fake.make_folder(ZONE)
    return fake


@pytest.fixture
def zone(tmp_path: Path) -> Iterator[DirectoryBackend]:
    backend = DirectoryBackend(str(tmp_path))
    yield backend
    backend.close()


def calls_of(fs: FakeFileSystem, act: Callable[[], object]) -> list[str]:
    """The system calls that act makes, with the paths that they name."""
    made: list[str] = []

    def hook(name: str, args: tuple[Any, ...]) -> None:
        paths = [arg for arg in args if isinstance(arg, str)]
        made.append(" ".join([name, *(paths or [fs.path_of(args[0])])]))

    fs.before_call = hook
    act()
    fs.before_call = None
    return made


# looking at a directory


def test_looking_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    (tmp_path / "Documents").mkdir()
    before = sorted(os.walk(tmp_path))
    backend = DirectoryBackend(str(tmp_path), recycle_files_max=3)
    assert backend.lock_note() is None
    assert backend.list("") == [Entry("holiday.jpg", 1)]
    assert backend.foreign_names(()) == ["Documents", "holiday.jpg"]
    backend.used_bytes()
    backend.free_bytes()
    backend.close()
    assert sorted(os.walk(tmp_path)) == before


def test_foreign_names(tmp_path: Path, zone: DirectoryBackend) -> None:
    (tmp_path / "lost+found").mkdir()
    assert zone.foreign_names(()) == [], "an empty file system is empty"
    zone.lock("me")
    zone.put("superblock", b"s")
    zone.create("log/1/1", 4096).close()
    assert zone.foreign_names(("superblock", "log")) == []
    assert zone.foreign_names(("log",)) == ["superblock"]
    (tmp_path / ".hidden").touch()
    (tmp_path / "Log").touch()
    assert zone.foreign_names(("superblock", "log")) == [".hidden", "Log"]


def test_list_shows_objects_only(tmp_path: Path, zone: DirectoryBackend) -> None:
    zone.lock("me")
    zone.put("log/a", b"1")
    (tmp_path / "log" / "UPPER").touch()
    (tmp_path / "log" / "a link").symlink_to("a")
    (tmp_path / "log" / "link").symlink_to("a")
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "lost+found" / "inode").touch()
    os.mkfifo(tmp_path / "log" / "pipe")
    assert zone.list("") == [Entry("log/a", 1)]


@pytest.mark.parametrize("name", ["lock", "tmp/1", "spare/4096-0", "tmp", "spare"])
def test_own_names_are_refused(zone: DirectoryBackend, name: str) -> None:
    zone.lock("me")
    for call in (lambda: zone.put(name, b""), lambda: zone.get(name), lambda: zone.delete(name)):
        with pytest.raises(InvalidRequest, match="keeps this name"):
            call()
    assert zone.lock_note() == "me"


def test_names() -> None:
    assert is_name("/".join(["a"] * NAME_PARTS_MAX))
    assert not is_name("/".join(["a"] * (NAME_PARTS_MAX + 1)))
    assert is_name("a" * NAME_BYTES_MAX)
    assert not is_name("a" * (NAME_BYTES_MAX + 1))
    assert is_name("...")
    assert is_name(".a/..b")
    assert not is_name("a\n")


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="zone=/no/such"):
        DirectoryBackend("/no/such")
    (tmp_path / "file").touch()
    with pytest.raises(ZoneFailed, match="ENOTDIR"):
        DirectoryBackend(str(tmp_path / "file"))


def test_the_zone_is_the_directory_that_was_opened(tmp_path: Path) -> None:
    """As when a disk is unmounted below the server, or another one is mounted over it."""
    (tmp_path / "zone").mkdir()
    backend = DirectoryBackend(str(tmp_path / "zone"))
    backend.put("log/a", b"1")
    (tmp_path / "zone").rename(tmp_path / "moved")
    (tmp_path / "zone").mkdir()
    backend.put("log/b", b"2")
    assert list((tmp_path / "zone").iterdir()) == []
    assert (tmp_path / "moved" / "log" / "b").read_bytes() == b"2"
    backend.close()


# order of system calls


def test_a_zone_that_moved_away_is_noticed(tmp_path: Path) -> None:
    place = tmp_path / "zone"
    place.mkdir()
    backend = DirectoryBackend(str(place))
    try:
        backend.check()
        place.rename(tmp_path / "elsewhere")
        with pytest.raises(NotFound):
            backend.check()
        place.mkdir()
        with pytest.raises(ZoneFailed, match="another directory"):
            backend.check()
    finally:
        backend.close()


def test_a_zone_that_became_read_only_is_noticed(fs: FakeFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = DirectoryBackend(ZONE, fs=fs)
    backend.check()
    sound = fs.fstatvfs

    def read_only(fd: int, /) -> os.statvfs_result:
        fields = list(sound(fd))
        fields[8] = os.ST_RDONLY
        return os.statvfs_result(fields)

    monkeypatch.setattr(fs, "fstatvfs", read_only)
    with pytest.raises(ZoneFailed, match="read-only"):
        backend.check()


def test_put_syncs_the_file_before_its_name_and_the_name_before_it_returns(fs: FakeFileSystem) -> None:
    backend = DirectoryBackend(ZONE, fs=fs)
    backend.put("log/1/a", b"warm")
    assert calls_of(fs, lambda: backend.put("log/1/b", b"x")) == [
        "open tmp/1",
        "pwritev tmp/1",
        "fsync tmp/1",
        "close tmp/1",
        "rename tmp/1 log/1/b",
        "open log/1",
        "fsync log/1",
        "close log/1",
    ]


def test_create_allocates_and_syncs_before_the_name(fs: FakeFileSystem) -> None:
    backend = DirectoryBackend(ZONE, fs=fs)
    backend.put("log/1/a", b"warm")
    assert calls_of(fs, lambda: backend.create("log/1/b", SIZE)) == [
        "fstatvfs /zone",
        "open tmp/1",
        "posix_fallocate tmp/1",
        "fsync tmp/1",
        "link tmp/1 log/1/b",
        "unlink tmp/1",
        "open log/1",
        "fsync log/1",
        "close log/1",
    ]


def test_new_folders_are_synced_from_the_top(fs: FakeFileSystem) -> None:
    backend = DirectoryBackend(ZONE, fs=fs)
    backend.put("warm", b"")
    made = calls_of(fs, lambda: backend.put("log/1/a", b"x"))
    assert [call for call in made if not call.startswith(("open", "close"))] == [
        "pwritev tmp/1",
        "fsync tmp/1",
        "mkdir log",
        "fsync .",
        "mkdir log/1",
        "fsync log",
        "rename tmp/1 log/1/a",
        "fsync log/1",
    ]


def test_the_hot_calls_are_those_of_os(zone: DirectoryBackend) -> None:
    handle = zone.create("a", 4096)
    assert isinstance(handle, FileHandle)
    assert handle._preadv is os.preadv
    assert handle._pwritev is os.pwritev
    handle.close()


def test_data_is_for_its_owner(tmp_path: Path, zone: DirectoryBackend) -> None:
    zone.lock("me")
    zone.put("a", b"1")
    zone.create("b", 4096).close()
    modes = {path.name: path.stat().st_mode & 0o077 for path in tmp_path.iterdir() if path.is_file()}
    assert modes["a"] == modes["b"] == 0
    assert modes["lock"] & 0o044 == 0o044 & ~_umask()


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


# folders and leftovers


def test_empty_folders_go(tmp_path: Path, zone: DirectoryBackend) -> None:
    for name in ("log/1/a", "log/1/b", "log/2/c/d"):
        zone.put(name, b"")
    zone.delete("log/1/a")
    assert (tmp_path / "log" / "1").is_dir()
    zone.delete("log/1/b")
    zone.delete("log/2/c/d")
    assert list((tmp_path / "log").iterdir()) == []
    zone.put("log/1/a", b"again")
    assert zone.get("log/1/a") == b"again"


def test_only_the_holder_of_the_lock_cleans_up(tmp_path: Path, zone: DirectoryBackend) -> None:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp" / "0").write_bytes(b"left by a crash")
    zone.put("a", b"works beside it")
    assert (tmp_path / "tmp" / "0").exists()
    zone.lock("server")
    assert list((tmp_path / "tmp").iterdir()) == []
    unfinished = zone.put_stream("b")
    unfinished.write([b"half"])
    other = DirectoryBackend(str(tmp_path))
    with pytest.raises(Busy):
        other.lock("status command")
    other.close()
    unfinished.commit()
    assert zone.get("b") == b"half"


# lock


def test_lock_ends_with_kill_9(tmp_path: Path, zone: DirectoryBackend) -> None:
    program = (
        "import sys, time\n"
        "from objstore.backend.directory import DirectoryBackend\n"
        "DirectoryBackend(sys.argv[1]).lock('pid of the child')\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stdout.readline() == b"locked\n"
    assert zone.lock_note() == "pid of the child"
    with pytest.raises(Busy, match="pid of the child"):
        zone.lock("me")
    child.kill()
    child.wait()
    child.stdin.close()
    child.stdout.close()
    assert zone.lock_note() is None
    zone.lock("me")
    assert zone.lock_note() == "me"


@pytest.mark.parametrize("note", ["two\nlines", "x" * 2000])
def test_lock_note_is_a_short_line(zone: DirectoryBackend, note: str) -> None:
    with pytest.raises(InvalidRequest, match="one line"):
        zone.lock(note)
    zone.lock("")
    assert zone.lock_note() == ""


# abilities of the file system


def test_nowait_is_tried_once(fs: FakeFileSystem) -> None:
    fs.takes_nowait = False
    backend = DirectoryBackend(ZONE, fs=fs)
    data = memoryview(bytearray(4096))
    for name in ("a", "b"):
        handle = backend.create(name, SIZE)
        for _ in range(3):
            assert handle.read_nowait(0, [data]) == -1
    assert fs.counts["preadv"] == 1


def test_nowait_miss_is_not_remembered(fs: FakeFileSystem) -> None:
    handle = DirectoryBackend(ZONE, fs=fs).create("a", SIZE)
    data = memoryview(bytearray(4096))
    fs.nowait_miss = 1.0
    assert handle.read_nowait(0, [data]) == -1
    fs.nowait_miss = 0.0
    assert handle.read_nowait(0, [data]) == 4096
    assert handle.read_nowait(SIZE - 4095, [data]) == -1, "short"


def test_durable_write_without_dsync_syncs_the_file(fs: FakeFileSystem) -> None:
    fs.takes_dsync = False
    backend = DirectoryBackend(ZONE, fs=fs)
    handle = backend.create("a", SIZE)
    assert calls_of(fs, lambda: handle.write_durable(0, views(b"x"))) == [
        "pwritev tmp/0",
        "pwritev tmp/0",
        "fdatasync tmp/0",
    ]
    assert calls_of(fs, lambda: handle.write_durable(0, views(b"x"))) == ["pwritev tmp/0", "fdatasync tmp/0"]
    fs.takes_dsync = True
    other = DirectoryBackend(ZONE, fs=fs).open("a")
    assert isinstance(other, FileHandle)


def test_durable_write_is_one_call(fs: FakeFileSystem) -> None:
    handle = DirectoryBackend(ZONE, fs=fs).create("a", SIZE)
    assert calls_of(fs, lambda: handle.write_durable(0, views(b"x"))) == ["pwritev tmp/0"]


def test_durable_write_after_truncate_brings_the_size(fs: FakeFileSystem) -> None:
    handle = DirectoryBackend(ZONE, fs=fs).create("a", SIZE)
    handle.truncate(4096)
    assert calls_of(fs, lambda: handle.write_durable(0, views(b"x"))) == ["pwritev tmp/0", "fsync tmp/0"]
    assert calls_of(fs, handle.sync) == ["fdatasync tmp/0"]


def test_uncached_read_falls_back(fs: FakeFileSystem) -> None:
    fs.takes_direct = False
    handle = DirectoryBackend(ZONE, fs=fs).create("a", SIZE)
    data = memoryview(bytearray(100))
    assert calls_of(fs, lambda: handle.read_uncached(5, [data])) == [
        "reopen tmp/0",
        "posix_fadvise tmp/0",
        "preadv tmp/0",
    ]
    assert calls_of(fs, lambda: handle.read_uncached(5, [data])) == ["posix_fadvise tmp/0", "preadv tmp/0"]


def test_uncached_read_really_goes_direct(tmp_path: Path, zone: DirectoryBackend) -> None:
    handle = zone.create("a", 3 << 20)
    assert isinstance(handle, FileHandle)
    content = random.Random(1).randbytes(3 << 20)
    handle.write(0, views(content))
    data = bytearray(len(content) - 10)
    assert handle.read_uncached(5, [memoryview(data)[:1000], memoryview(data)[1000:]]) == len(data)
    assert data == content[5:-5]
    handle.close()
    assert handle._direct_fd == -1


# spare files


def spares(fs: FakeFileSystem) -> list[str]:
    fd = fs.open(f"{ZONE}/spare", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    names = sorted(fs.listdir(fd))
    fs.close(fd)
    return names


def test_spare_files_are_bounded_and_used_again(fs: FakeFileSystem) -> None:
    backend = DirectoryBackend(ZONE, fs=fs, recycle_files_max=2)
    backend.lock("me")
    for name in "abc":
        handle = backend.create(name, SIZE)
        handle.write(0, views(name.encode() * 100))
        handle.close()
    for name in "abc":
        backend.retire(name)
    assert spares(fs) == [f"{SIZE}-0", f"{SIZE}-1"]
    made = calls_of(fs, lambda: backend.create("d", SIZE).close())
    assert "posix_fallocate" not in " ".join(made)
    assert backend.get("d")[:100] == b"a" * 100
    backend.create("e", SIZE + 4096).close()
    assert spares(fs) == [f"{SIZE}-1"], "another size takes none"
    assert backend.get("e") == bytes(SIZE + 4096)


def test_only_wanted_sizes_are_kept(fs: FakeFileSystem) -> None:
    backend = DirectoryBackend(ZONE, fs=fs, recycle_files_max=1)
    backend.lock("me")
    for size_bytes in range(4096, 6 * 4096, 4096):
        backend.create(f"s{size_bytes}", size_bytes).close()
    backend.put("odd", bytes(5000))
    backend.retire("odd")
    backend.retire("s4096")
    assert spares(fs) == [], "five sizes ago"
    backend.retire("s8192")
    assert spares(fs) == ["8192-0"]
    backend.retire("s12288")
    assert spares(fs) == ["8192-0"], "the pool is full"
    for turn in range(4):
        backend.create(f"new{turn}", 20480 + turn * 4096).close()
    backend.retire("new0")
    assert spares(fs) == ["20480-1"], "a size that nobody asks for makes room"


def test_spares_of_the_past_are_adopted(fs: FakeFileSystem) -> None:
    first = DirectoryBackend(ZONE, fs=fs, recycle_files_max=4)
    first.lock("first")
    for name in "abcd":
        first.create(name, SIZE).close()
    for name in "abcd":
        first.retire(name)
    first.close()
    spare = f"{ZONE}/spare/{SIZE}-"
    fs.link(f"{spare}2", f"{ZONE}/object")
    short = fs.open(f"{spare}3", os.O_RDWR | os.O_CLOEXEC)
    fs.ftruncate(short, 100)
    fs.close(short)
    fs.close(fs.open(f"{ZONE}/spare/rubbish", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC))
    second = DirectoryBackend(ZONE, fs=fs, recycle_files_max=4)
    second.lock("second")
    assert spares(fs) == [f"{SIZE}-0", f"{SIZE}-1"]
    second.create("e", SIZE).close()
    second.retire("e")
    assert spares(fs) == [f"{SIZE}-1", f"{SIZE}-2"], "a new spare gets a name of its own"
    second.close()
    third = DirectoryBackend(ZONE, fs=fs, recycle_files_max=1)
    third.lock("third")
    assert spares(fs) == [f"{SIZE}-1"]
    third.close()
    DirectoryBackend(ZONE, fs=fs).lock("fourth")
    assert spares(fs) == []


def test_a_file_with_a_second_name_is_not_recycled(fs: FakeFileSystem) -> None:
    """As after a backup made of hard links."""
    backend = DirectoryBackend(ZONE, fs=fs, recycle_files_max=2)
    backend.lock("me")
    handle = backend.create("a", SIZE)
    handle.write(0, views(b"backed up"))
    handle.close()
    fs.link(f"{ZONE}/a", f"{ZONE}/backup")
    backend.retire("a")
    assert spares(fs) == []
    handle = backend.create("b", SIZE)
    handle.write(0, views(b"something else"))
    handle.close()
    assert fs.content(f"{ZONE}/backup")[:9] == b"backed up"


def test_a_refused_create_gives_its_spare_back(fs: FakeFileSystem) -> None:
    backend = DirectoryBackend(ZONE, fs=fs, recycle_files_max=2)
    backend.lock("me")
    backend.create("a", SIZE).close()
    backend.create("b", SIZE).close()
    backend.retire("a")
    with pytest.raises(Exists):
        backend.create("b", SIZE)
    assert spares(fs) == [f"{SIZE}-0"]
    assert backend.free_bytes() == fs.capacity_bytes - fs.taken_bytes + SIZE


# errors


def test_every_errno_has_one_meaning() -> None:
    def meaning(code: int) -> type[StoreError]:
        return type(translated(OSError(code, os.strerror(code)), "/z", "put", "a"))

    assert meaning(errno.ENOENT) is NotFound
    assert meaning(errno.EEXIST) is Exists
    assert meaning(errno.ENOSPC) is meaning(errno.EDQUOT) is NoSpace
    others = set(errno.errorcode) - {errno.ENOENT, errno.EEXIST, errno.ENOSPC, errno.EDQUOT}
    assert {meaning(code) for code in others} == {ZoneFailed}
    assert str(translated(OSError(errno.EIO, ""), "/z", "put", "a/b")).endswith("call=put name=a/b zone=/z errno=EIO")


def test_after_a_failed_sync_the_handle_is_not_believed(fs: FakeFileSystem) -> None:
    backend = DirectoryBackend(ZONE, fs=fs)
    handle = backend.create("a", SIZE)
    handle.write(0, views(b"x"))
    fail_at(fs, "fdatasync", errno.EIO)
    with pytest.raises(ZoneFailed, match="EIO"):
        handle.sync()
    fs.before_call = None
    with pytest.raises(ZoneFailed, match="earlier error"):
        handle.sync()
    with pytest.raises(ZoneFailed, match="earlier error"):
        handle.write_durable(0, views(b"y"))
    assert handle.read(0, [memoryview(bytearray(1))]) == 1


@pytest.mark.parametrize("call", ["write", "write_soon", "write_around", "write_durable"])
def test_a_write_that_found_no_space_may_be_repeated(fs: FakeFileSystem, call: str) -> None:
    """As on file systems that copy on write: allocated does not mean reserved there."""
    handle = DirectoryBackend(ZONE, fs=fs).create("a", SIZE)
    data = views(b"x" * 4096)
    fail_at(fs, "pwritev", errno.ENOSPC)
    with pytest.raises(NoSpace):
        getattr(handle, call)(0, data)
    fs.before_call = None
    getattr(handle, call)(0, data)
    handle.sync()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOENT, errno.EINVAL])
def test_where_the_page_cache_can_not_be_avoided_writes_go_through_it(fs: FakeFileSystem, code: int) -> None:
    """No descriptor is left, /proc is not mounted, the file system has no O_DIRECT: no fault of the zone."""
    backend = DirectoryBackend(ZONE, fs=fs)
    handle = backend.create("a", SIZE)
    fail_at(fs, "reopen", code)
    handle.write_around(0, views(b"x" * 4096))
    fs.before_call = None
    handle.write_around(4096, views(b"y" * 4096))
    handle.sync()
    assert backend.get("a")[:8192] == b"x" * 4096 + b"y" * 4096


def test_an_error_of_a_write_around_the_page_cache_fails_the_zone(fs: FakeFileSystem) -> None:
    handle = DirectoryBackend(ZONE, fs=fs).create("a", SIZE)
    fail_at(fs, "pwritev", errno.EIO)
    with pytest.raises(ZoneFailed, match=r"write_around.*EIO"):
        handle.write_around(0, views(b"x" * 4096))
    fs.before_call = None
    with pytest.raises(ZoneFailed, match="earlier error"):
        handle.sync()


def test_a_name_that_can_not_be_synced_fails_the_zone(fs: FakeFileSystem) -> None:
    """NoSpace would say that nothing was done, and the new name is there."""
    backend = DirectoryBackend(ZONE, fs=fs)
    backend.put("log/a", b"old")

    def hook(called: str, args: tuple[Any, ...]) -> None:
        if called == "fsync" and fs.path_of(args[0]) == "log":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fs.before_call = hook
    for call in (lambda: backend.put("log/a", b"new"), lambda: backend.create("log/b", SIZE)):
        with pytest.raises(ZoneFailed, match="ENOSPC"):
            call()


def fail_at(fs: FakeFileSystem, name: str, code: int) -> None:
    def hook(called: str, args: tuple[Any, ...]) -> None:
        if called == name:
            raise OSError(code, os.strerror(code))

    fs.before_call = hook


def _warm(backend: Backend) -> None:
    backend.lock("me")
    backend.put("log/1/a", b"old")
    for name in ("log/1/b", "log/1/c"):
        backend.create(name, SIZE).close()
    backend.retire("log/1/c")


def _stream(backend: Backend) -> None:
    writer = backend.put_stream("log/1/n")
    try:
        writer.write([b"x" * 5000])
        writer.commit()
    finally:
        writer.abort()


def _use(backend: Backend) -> None:
    handle = backend.open("log/1/b")
    try:
        handle.read(0, [memoryview(bytearray(100))])
        handle.read_nowait(0, [memoryview(bytearray(100))])
        handle.read_uncached(0, [memoryview(bytearray(100))])
    finally:
        handle.close()


def _write(backend: Backend) -> None:
    handle = backend.create("log/2/w", SIZE)
    try:
        handle.write(0, views(b"x"))
        handle.write_durable(1, views(b"x"))
        handle.truncate(4096)
        handle.sync()
    finally:
        handle.close()


ACTIONS: dict[str, Callable[[Backend], object]] = {
    "put": lambda backend: backend.put("log/2/n", b"new"),
    "put over": lambda backend: backend.put("log/1/a", b"new"),
    "put_if_absent": lambda backend: backend.put_if_absent("log/1/n", b"new"),
    "replace_if": lambda backend: backend.replace_if("log/1/a", b"old", b"new"),
    "stream": _stream,
    "get": lambda backend: backend.get("log/1/a"),
    "create fresh": lambda backend: backend.create("log/2/n", SIZE + 4096).close(),
    "create recycled": lambda backend: backend.create("log/2/n", SIZE).close(),
    "write": _write,
    "read": _use,
    "list": lambda backend: backend.list(""),
    "delete": lambda backend: backend.delete("log/1/a"),
    "retire": lambda backend: backend.retire("log/1/b"),
    "space": lambda backend: (backend.free_bytes(), backend.used_bytes()),
    "lock_note": lambda backend: backend.lock_note(),
    "lock": lambda backend: DirectoryBackend("/other", fs=backend._fs).lock("x"),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("action", ACTIONS)
def test_an_error_at_any_call_is_translated_and_leaks_nothing(action: str, code: int) -> None:
    """The calls-th call and all later ones but close fail, for every calls."""
    for calls in range(60):
        fs = FakeFileSystem(rng=random.Random(calls))
        fs.make_folder(ZONE)
        fs.make_folder("/other")
        backend = DirectoryBackend(ZONE, fs=fs, recycle_files_max=2)
        _warm(backend)
        open_count = fs.open_count()
        left = calls

        def hook(name: str, args: tuple[Any, ...]) -> None:
            nonlocal left
            left -= 1
            if left < 0 and name != "close":
                raise OSError(code, os.strerror(code))

        fs.before_call = hook
        failure: StoreError | None = None
        try:
            ACTIONS[action](backend)
        except StoreError as error:
            failure = error
        fs.before_call = None
        if left >= 0:
            assert failure is None
            break
        if failure is not None:
            assert isinstance(failure, ZoneFailed if code == errno.EIO else (NoSpace, ZoneFailed))
            assert isinstance(failure.__cause__, OSError) or "earlier error" in str(failure)
            assert errno.errorcode[code] in str(failure)
        if action == "lock":
            continue  # the backend made there keeps its directory open
        assert fs.open_count() == open_count, f"{action} leaks at call {calls}"
        assert backend.list("log/"), "the backend still works"
    else:
        raise AssertionError("the action makes more calls than this test tries")


def test_no_descriptor_is_left(fs: FakeFileSystem) -> None:
    backend = DirectoryBackend(ZONE, fs=fs, recycle_files_max=2)
    _warm(backend)
    for action in ACTIONS.values():
        if action is not ACTIONS["lock"]:
            action(backend)
            backend.delete("log/1/n")
            backend.delete("log/2/n")
            backend.put("log/1/a", b"old")
    assert fs.open_count() == 2, "the directory and its lock"
    backend.close()
    assert fs.open_count() == 0


def test_file_systems_offer_the_same_calls() -> None:
    calls = {name for name in vars(FileSystem) if not name.startswith("_")}
    for file_system in (OS_FILE_SYSTEM, FakeFileSystem()):
        assert calls <= set(dir(file_system))
