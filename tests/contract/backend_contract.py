"""What every backend must do, as tests over `objstore.backend.base`.

`BackendContract` needs a fixture `place`. `FaultContract` besides needs storage that can lose power, run full and fail.
Each test takes the place alone, so that tests/objstore/backend/test_contract.py can also run them over broken backends.
"""

import itertools
import random
import sys
import threading
from collections.abc import Callable
from typing import Protocol

import pytest

from objstore.backend.base import Backend, Conflict, Entry, Handle, ZoneFailed
from objstore.errors import Busy, Exists, InvalidRequest, NoSpace, NotFound
from tests.support.fakefs import Crash

KIB = 1024
SIZE = 64 * KIB
SEEDS = 12
CALLS_MAX = 200
THREADS = 8


class Place(Protocol):
    """Storage that any number of backends look at, as several processes look at one directory."""

    def open(self) -> Backend: ...


class FaultyPlace(Place, Protocol):
    """Storage with faults on demand."""

    def crash_at(self, calls: int | None) -> None:
        """Raise Crash in the calls-th call to the storage from now on (0 is the next one); None: no more."""
        ...

    def at_call(self, calls: int, action: Callable[[], None]) -> None:
        """Run action inside the calls-th call to the storage from now on, once, just before that call takes effect."""
        ...

    def kill(self) -> None:
        """What runs is dead; everything it did stays visible."""
        ...

    def cut_power(self, rng: random.Random) -> None:
        """What is not durable may be lost, what runs is dead."""
        ...

    def leave_free(self, free_bytes: int) -> None:
        """From now on there is room for so much more."""
        ...

    def fail_syncs(self, count: int) -> None:
        """The next so many syncs of files fail with an I/O error, and keep what they like."""
        ...

    def short_transfers(self, bytes_max: int | None) -> None:
        """The storage moves at most so many bytes in a call; None: no limit."""
        ...


def views(*pieces: bytes) -> list[memoryview]:
    return [memoryview(piece) for piece in pieces]


def read(handle: Handle, offset_bytes: int, length_bytes: int) -> bytes:
    data = bytearray(length_bytes)
    return bytes(data[: handle.read(offset_bytes, [memoryview(data)])])


def read_uncached(handle: Handle, offset_bytes: int, length_bytes: int) -> bytes:
    data = bytearray(length_bytes)
    return bytes(data[: handle.read_uncached(offset_bytes, [memoryview(data)])])


def names(backend: Backend, prefix: str = "") -> list[str]:
    return [entry.name for entry in backend.list(prefix)]


def race(count: int, action: Callable[[int], None]) -> list[BaseException]:
    """Run action(0..count-1) in threads that start together; returns what they raised."""
    start = threading.Barrier(count)
    raised: list[BaseException] = []

    def run(index: int) -> None:
        start.wait()
        try:
            action(index)
        except Exception as error:  # noqa: BLE001 - handed to the test
            raised.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return raised


WAYS_TO_WRITE = ("write", "write_soon", "write_around")


class BackendContract:
    """Clauses that hold as long as nothing fails."""

    # whole objects

    def test_put_then_get(self, place: Place) -> None:
        backend = place.open()
        backend.put("epoch/1", b"one")
        backend.put("empty", b"")
        assert backend.get("epoch/1") == b"one"
        assert backend.get("empty") == b""
        assert place.open().get("epoch/1") == b"one"

    def test_put_replaces(self, place: Place) -> None:
        backend = place.open()
        backend.put("a", b"a long former value")
        backend.put("a", b"new")
        assert backend.get("a") == b"new"
        assert backend.list("") == [Entry("a", 3)]

    def test_put_keeps_its_own_copy(self, place: Place) -> None:
        backend = place.open()
        data = bytearray(b"before")
        writer = backend.put_stream("a")
        writer.write([memoryview(data)])
        data[:] = b"after!"
        writer.commit()
        assert backend.get("a") == b"before"

    def test_names_are_checked(self, place: Place) -> None:
        backend = place.open()
        for name in (
            "",
            "/a",
            "a/",
            "a//b",
            ".",
            "..",
            "a/../b",
            "a/.",
            "A",
            "a b",
            "ä",
            "a\0",
            "1/2/3/4/5/6/7/8/9",
            "x" * 300,
        ):
            for act in (backend.get, backend.open, backend.delete, backend.retire, backend.put_stream):
                with pytest.raises(InvalidRequest):
                    act(name)
            for store in (backend.put, backend.put_if_absent):
                with pytest.raises(InvalidRequest):
                    store(name, b"")
            with pytest.raises(InvalidRequest):
                backend.create(name, SIZE)
            with pytest.raises(InvalidRequest):
                backend.replace_if(name, b"", b"")

    def test_names_have_up_to_eight_parts(self, place: Place) -> None:
        backend = place.open()
        name = "0/a-z/b_c/d.e/.f/g../..h/i"
        backend.put(name, b"deep")
        assert backend.get(name) == b"deep"
        assert backend.list("") == [Entry(name, 4)]

    def test_absent_is_not_found(self, place: Place) -> None:
        backend = place.open()
        backend.put("a/b", b"")
        for name in ("c", "a/c", "c/d", "a", "a/b/c"):
            with pytest.raises(NotFound):
                backend.get(name)
            with pytest.raises(NotFound):
                backend.open(name)

    def test_stream_is_invisible_until_commit(self, place: Place) -> None:
        backend = place.open()
        backend.put("log/a", b"old")
        writer = backend.put_stream("log/a")
        fresh = backend.put_stream("log/b")
        writer.write([b"new ", memoryview(b"and "), b""])
        writer.write([memoryview(b"longer")])
        fresh.write([b"fresh"])
        assert backend.get("log/a") == b"old"
        assert backend.list("") == [Entry("log/a", 3)]
        writer.commit()
        fresh.commit()
        assert backend.get("log/a") == b"new and longer"
        assert backend.list("") == [Entry("log/a", 14), Entry("log/b", 5)]

    def test_abort_leaves_nothing(self, place: Place) -> None:
        backend = place.open()
        used_bytes = backend.used_bytes()
        writer = backend.put_stream("a")
        writer.write([bytes(SIZE)])
        writer.abort()
        writer.abort()
        assert backend.list("") == []
        assert backend.used_bytes() == used_bytes

    def test_abort_after_commit_does_nothing(self, place: Place) -> None:
        backend = place.open()
        writer = backend.put_stream("a")
        writer.write([b"kept"])
        writer.commit()
        writer.abort()
        assert backend.get("a") == b"kept"

    def test_put_if_absent(self, place: Place) -> None:
        backend = place.open()
        backend.put_if_absent("a/b", b"first")
        with pytest.raises(Exists):
            backend.put_if_absent("a/b", b"second")
        assert backend.get("a/b") == b"first"
        assert names(backend) == ["a/b"]
        backend.delete("a/b")
        backend.put_if_absent("a/b", b"third")
        assert backend.get("a/b") == b"third"

    def test_put_if_absent_has_one_winner(self, place: Place) -> None:
        backends = [place.open() for _ in range(THREADS)]
        for turn in range(20):
            name = f"race/{turn}"
            raised = race(THREADS, lambda index, name=name: backends[index].put_if_absent(name, b"%d" % index))
            assert [type(error) for error in raised] == [Exists] * (THREADS - 1)
            assert int(backends[0].get(name)) in range(THREADS)

    def test_replace_if(self, place: Place) -> None:
        backend = place.open()
        with pytest.raises(Conflict):
            backend.replace_if("a", b"", b"1")
        assert names(backend) == []
        backend.put("a", b"1")
        for expected in (b"", b"2", b"11"):
            with pytest.raises(Conflict):
                backend.replace_if("a", expected, b"wrong")
        assert backend.get("a") == b"1"
        backend.replace_if("a", b"1", b"2")
        assert backend.get("a") == b"2"

    def test_replace_if_has_one_winner(self, place: Place) -> None:
        backend = place.open()
        backend.put("a", b"start")
        for turn in range(20):
            before = backend.get("a")
            raised = race(
                THREADS,
                lambda index, turn=turn, before=before: backend.replace_if("a", before, b"%d by %d" % (turn, index)),
            )
            assert [type(error) for error in raised] == [Conflict] * (THREADS - 1)
            assert backend.get("a").startswith(b"%d by " % turn)

    # open objects

    def test_created_object_has_its_size_at_once(self, place: Place) -> None:
        backend = place.open()
        handle = backend.create("log/1/1", SIZE)
        assert (handle.name, handle.size_bytes) == ("log/1/1", SIZE)
        assert backend.list("log/") == [Entry("log/1/1", SIZE)]
        assert len(read(handle, 0, 2 * SIZE)) == SIZE
        handle.close()
        handle = backend.open("log/1/1")
        assert (handle.name, handle.size_bytes) == ("log/1/1", SIZE)
        handle.close()

    def test_create_refuses_a_taken_name(self, place: Place) -> None:
        backend = place.open()
        backend.put("a", b"kept")
        backend.create("b", SIZE).close()
        used_bytes = backend.used_bytes()
        for name in ("a", "b"):
            with pytest.raises(Exists):
                backend.create(name, SIZE)
        with pytest.raises(Exists):
            backend.put_if_absent("b", b"")
        assert backend.get("a") == b"kept"
        assert backend.used_bytes() == used_bytes

    def test_create_needs_a_size(self, place: Place) -> None:
        backend = place.open()
        for size_bytes in (0, -1):
            with pytest.raises(InvalidRequest):
                backend.create("a", size_bytes)

    def test_create_keeps_the_reserve(self, place: Place) -> None:
        backend = place.open()
        used_bytes = backend.used_bytes()
        with pytest.raises(NoSpace):
            backend.create("a", SIZE, reserve_bytes=backend.free_bytes())
        with pytest.raises(NoSpace):
            backend.create("a", backend.free_bytes() + (1 << 30))
        assert names(backend) == []
        assert backend.used_bytes() == used_bytes
        backend.create("a", SIZE, reserve_bytes=backend.free_bytes() // 2).close()
        assert names(backend) == ["a"]

    def test_writes_land_where_they_belong(self, place: Place) -> None:
        backend = place.open()
        handle = backend.create("a", SIZE)
        handle.write(0, views(bytes(SIZE)))
        handle.write(1000, views(b"abc", b"", b"defg"))
        handle.write(1003, views(b"X"))
        handle.write_durable(SIZE - 2, views(b"y", b"z"))
        handle.write(5, [])
        handle.sync()
        expected = bytearray(SIZE)
        expected[1000:1007] = b"abcXefg"
        expected[-2:] = b"yz"
        assert read(handle, 0, SIZE) == expected
        handle.close()
        assert backend.get("a") == expected

    def test_more_buffers_than_one_call_takes(self, place: Place) -> None:
        handle = place.open().create("a", SIZE)
        pieces = [b"%05d" % number for number in range(5000)]
        handle.write(7, views(*pieces))
        handle.write_durable(7 + 25000, views(*pieces))
        for call in (handle.read, handle.read_uncached):
            data = bytearray(50000)
            parts = [memoryview(data)[at : at + 10] for at in range(0, 50000, 10)]
            assert call(7, parts) == 50000
            assert data == b"".join(pieces) * 2
        handle.close()

    @pytest.mark.parametrize("way", WAYS_TO_WRITE)
    def test_every_way_of_writing_is_read_back(self, place: Place, way: str) -> None:
        content = random.Random(3).randbytes(SIZE)
        handle = place.open().create("log/a", SIZE)
        write = getattr(handle, way)
        edges = [0, 4 * KIB, 12 * KIB, 12 * KIB + 1, 20 * KIB - 7, 20 * KIB, SIZE]
        for low, high in itertools.pairwise(edges):
            write(low, views(content[low:high]))
        found = bytearray(SIZE)
        assert handle.read(0, [memoryview(found)]) == SIZE
        assert found == content
        assert place.open().get("log/a") == content

    def test_write_past_the_size_is_refused(self, place: Place) -> None:
        backend = place.open()
        handle = backend.create("a", SIZE)
        for call in (handle.write, handle.write_durable):
            with pytest.raises(InvalidRequest):
                call(SIZE - 1, views(b"a", b"b"))
        assert backend.list("") == [Entry("a", SIZE)]
        handle.close()

    def test_read_ends_with_the_object(self, place: Place) -> None:
        backend = place.open()
        backend.put("a", b"0123456789")
        handle = backend.open("a")
        for call in (handle.read, handle.read_uncached):
            data = bytearray(b"." * 8)
            assert call(6, [memoryview(data)[:3], memoryview(data)[3:]]) == 4
            assert data == b"6789....", "bytes behind the end of the object must stay as they were"
            for offset_bytes in (10, 11, SIZE):
                assert call(offset_bytes, [memoryview(data)]) == 0
            assert data == b"6789...."
        handle.close()

    def test_read_uncached_takes_any_alignment(self, place: Place) -> None:
        backend = place.open()
        content = random.Random(1).randbytes(SIZE)
        handle = backend.create("a", SIZE)
        handle.write(0, views(content))
        for offset_bytes in (0, 1, 511, 4095, 4096, 12289):
            for length_bytes in (0, 1, 4096, 9001, 40000):
                data = bytearray(length_bytes)
                cut = length_bytes // 3
                parts = [memoryview(data)[:cut], memoryview(bytearray()), memoryview(data)[cut:]]
                assert handle.read_uncached(offset_bytes, parts) == length_bytes
                assert data == content[offset_bytes : offset_bytes + length_bytes]
        handle.close()

    def test_read_nowait_is_right_or_says_nothing(self, place: Place) -> None:
        backend = place.open()
        handle = backend.create("a", SIZE)
        handle.write(0, views(b"0123" * (SIZE // 4)))
        for offset_bytes, length_bytes in ((0, 4096), (1, 9), (SIZE - 4, 4), (SIZE - 4, 8), (SIZE, 4), (SIZE + 9, 4)):
            data = bytearray(length_bytes)
            expected = read(handle, offset_bytes, length_bytes)
            got = handle.read_nowait(offset_bytes, [memoryview(data)])
            assert got in (-1, len(expected))
            if got >= 0:
                assert data[:got] == expected
        handle.close()

    def test_handles_of_one_object_see_each_other(self, place: Place) -> None:
        backend = place.open()
        writer = backend.create("a", SIZE)
        reader = backend.open("a")
        writer.write(100, views(b"hello"))
        assert read(reader, 100, 5) == b"hello"
        writer.close()
        assert read(reader, 100, 5) == b"hello"
        reader.close()

    def test_truncate(self, place: Place) -> None:
        backend = place.open()
        handle = backend.create("a", 16 * SIZE)
        handle.write(0, views(b"head" * KIB))
        free_bytes, used_bytes = backend.free_bytes(), backend.used_bytes()
        handle.truncate(4 * KIB)
        handle.sync()
        assert handle.size_bytes == 4 * KIB
        assert backend.list("") == [Entry("a", 4 * KIB)]
        assert used_bytes - backend.used_bytes() >= 15 * SIZE
        assert free_bytes >= 0
        assert read(handle, 0, SIZE) == b"head" * KIB
        with pytest.raises(InvalidRequest):
            handle.truncate(4 * KIB + 1)
        with pytest.raises(InvalidRequest):
            handle.write(4 * KIB, views(b"x"))
        handle.close()
        assert backend.open("a").size_bytes == 4 * KIB

    def test_handle_close_is_idempotent(self, place: Place) -> None:
        handle = place.open().create("a", SIZE)
        handle.close()
        handle.close()

    # the set of objects

    def test_list_knows_folders(self, place: Place) -> None:
        backend = place.open()
        for name in ("log/10/b", "log/1/b", "log/1/a", "log/1/c/d", "logs", "b", "log/1.x"):
            backend.put(name, name.encode())
        assert names(backend) == ["b", "log/1.x", "log/1/a", "log/1/b", "log/1/c/d", "log/10/b", "logs"]
        assert names(backend, "log/") == ["log/1.x", "log/1/a", "log/1/b", "log/1/c/d", "log/10/b"]
        assert backend.list("log/1/") == [Entry("log/1/a", 7), Entry("log/1/b", 7), Entry("log/1/c/d", 9)]
        assert names(backend, "log/1/c/") == ["log/1/c/d"]
        for absent in ("lo/", "log/2/", "logs/", "log/1/a/"):
            assert backend.list(absent) == []

    def test_list_checks_its_prefix(self, place: Place) -> None:
        backend = place.open()
        for prefix in ("/", "//", "../", "LOG/", "/log/"):
            with pytest.raises(InvalidRequest):
                backend.list(prefix)

    def test_thousands_of_objects_in_a_folder(self, place: Place) -> None:
        backend = place.open()
        expected = [f"log/1/{number:08x}" for number in range(1000)]
        for name in reversed(expected):
            writer = backend.create(name, 4096)
            writer.close()
        assert backend.list("log/1/") == [Entry(name, 4096) for name in expected]
        for name in expected[::2]:
            backend.delete(name)
        assert names(backend) == expected[1::2]

    def test_delete(self, place: Place) -> None:
        backend = place.open()
        backend.put("a/b/c", b"1")
        backend.put("a/d", b"2")
        backend.delete("a/b/c")
        backend.delete("a/b/c")
        backend.delete("never/was")
        assert names(backend) == ["a/d"]
        with pytest.raises(NotFound):
            backend.get("a/b/c")
        backend.put("a/b/c", b"3")
        assert backend.get("a/b/c") == b"3"

    def test_delete_all(self, place: Place) -> None:
        backend = place.open()
        for name in ("a/b/c", "a/b/d", "a/bc", "a/e"):
            backend.put(name, b"1")
        backend.delete_all("a/b/")
        backend.delete_all("a/b/")
        backend.delete_all("never/was/")
        assert names(backend) == ["a/bc", "a/e"]
        backend.put("a/b/c", b"2")
        assert backend.get("a/b/c") == b"2"

    def test_deleted_object_stays_readable_where_it_is_open(self, place: Place) -> None:
        backend = place.open()
        content = random.Random(2).randbytes(SIZE)
        handle = backend.create("a", SIZE)
        handle.write(0, views(content))
        handle.sync()
        reader = backend.open("a")
        backend.delete("a")
        backend.put("a", b"another one")
        other = backend.create("b", SIZE)
        other.write(0, views(bytes(SIZE)))
        assert read(handle, 0, SIZE) == content
        assert read(reader, 0, SIZE) == content
        assert read_uncached(reader, 0, SIZE) == content
        for each in (handle, reader, other):
            each.close()

    def test_retired_objects_are_gone(self, place: Place) -> None:
        backend = place.open()
        for turn in range(4):
            handles = [backend.create(f"log/{turn}/{number}", SIZE) for number in range(5)]
            for number, handle in enumerate(handles):
                handle.write(0, views(bytes([number + 1]) * SIZE))
            for number, handle in enumerate(handles):
                assert read(handle, 0, SIZE) == bytes([number + 1]) * SIZE, "two objects share their bytes"
                handle.close()
            assert len(backend.list("")) == 5
            for number in range(5):
                backend.retire(f"log/{turn}/{number}")
            backend.retire(f"log/{turn}/0")
            assert backend.list("") == []
            with pytest.raises(NotFound):
                backend.get(f"log/{turn}/0")

    def test_retire_takes_any_object(self, place: Place) -> None:
        backend = place.open()
        backend.create("a", SIZE).close()
        backend.put("b", bytes(SIZE))
        short = backend.create("c", SIZE)
        short.truncate(100)
        short.close()
        for name in ("a", "b", "c"):
            backend.retire(name)
        assert backend.list("") == []
        for name in ("a", "b", "c"):
            handle = backend.create(name, SIZE)
            assert len(read(handle, 0, SIZE)) == SIZE
            handle.close()

    def test_space_is_counted(self, place: Place) -> None:
        backend = place.open()
        backend.put("warm/up", b"")  # the first object may cost a folder
        used_bytes = backend.used_bytes()
        backend.create("warm/a", 1 << 20).close()
        assert 1 << 20 <= backend.used_bytes() - used_bytes < 1 << 21
        backend.delete("warm/a")
        assert backend.used_bytes() == used_bytes
        assert backend.free_bytes() > 0

    # ownership

    def test_lock_is_exclusive(self, place: Place) -> None:
        first, second = place.open(), place.open()
        assert first.lock_note() is None
        first.lock("pid=1 control=/run/a.sock")
        for backend in (first, second):
            with pytest.raises(Busy, match=r"pid=1 control=/run/a\.sock"):
                backend.lock("pid=2")
            assert backend.lock_note() == "pid=1 control=/run/a.sock"
        second.close()
        assert first.lock_note() == "pid=1 control=/run/a.sock"
        first.close()
        third = place.open()
        assert third.lock_note() is None
        third.lock("3")
        assert third.lock_note() == "3"

    def test_lock_leaves_objects_alone(self, place: Place) -> None:
        backend = place.open()
        backend.put("a", b"1")
        backend.create("log/b", SIZE).close()
        backend.lock("me")
        backend.put("c", b"2")
        assert names(backend) == ["a", "c", "log/b"]

    def test_close_is_idempotent(self, place: Place) -> None:
        backend = place.open()
        backend.lock("me")
        backend.close()
        backend.close()

    def test_handles_outlive_their_backend(self, place: Place) -> None:
        backend = place.open()
        handle = backend.create("a", SIZE)
        backend.close()
        handle.write(0, views(b"late"))
        handle.sync()
        assert read(handle, 0, 4) == b"late"
        handle.close()

    # threads

    def test_threads_share_folders(self, place: Place) -> None:
        backend = place.open()

        def come_and_go(index: int) -> None:
            for turn in range(15):
                name = f"shared/folder/{index}-{turn}"
                if turn % 2:
                    backend.put(name, b"%d" % turn)
                else:
                    backend.create(name, 4096).close()
                assert backend.open(name).close() is None
                (backend.delete if turn % 3 else backend.retire)(name)

        assert race(4, come_and_go) == []
        assert backend.list("") == []


class FaultContract:
    """Clauses about power cuts, full disks and errors."""

    def test_what_returned_is_durable(self, place: FaultyPlace) -> None:
        for seed in range(SEEDS):
            backend = place.open()
            new = f"put/{seed}/deep/down/"
            backend.put(new + "a", b"a")
            backend.put_if_absent(new + "b", b"b")
            stream = backend.put_stream(f"streams/{seed}/c")
            stream.write([b"c"])
            stream.commit()
            backend.put(f"d{seed}", b"old")
            backend.replace_if(f"d{seed}", b"old", b"new")
            backend.create(f"log/{seed}/e", SIZE).close()
            place.cut_power(random.Random(seed))
            backend = place.open()
            assert backend.get(new + "a") == b"a"
            assert backend.get(new + "b") == b"b"
            assert backend.get(f"streams/{seed}/c") == b"c"
            assert backend.get(f"d{seed}") == b"new"
            assert backend.list(f"log/{seed}/") == [Entry(f"log/{seed}/e", SIZE)]

    def test_delete_all_is_durable(self, place: FaultyPlace) -> None:
        for seed in range(SEEDS):
            backend = place.open()
            for name in ("a", "b", "c"):
                backend.put(f"gone/{seed}/{name}", b"1")
            backend.put(f"kept/{seed}", b"1")
            backend.delete(f"gone/{seed}/a")
            backend.delete_all(f"gone/{seed}/")
            place.cut_power(random.Random(seed))
            assert names(place.open(), f"gone/{seed}/") == []

    def test_what_was_found_is_durable_once_used(self, place: FaultyPlace) -> None:
        """A folder left by a process that was killed before it synced the folder's name."""
        for seed in range(SEEDS):
            for calls in range(CALLS_MAX):
                folder = f"s{seed}-{calls}/x"
                backend = place.open()
                backend.lock("maker")
                finished = False
                place.crash_at(calls)
                try:
                    backend.put(f"{folder}/a", b"a")
                    finished = True
                except Crash:
                    pass
                place.crash_at(None)
                place.kill()
                backend = place.open()
                backend.lock("heir")
                backend.put(f"{folder}/b", b"b")
                place.cut_power(random.Random(seed))
                assert place.open().get(f"{folder}/b") == b"b"
                if finished:
                    break
            else:
                raise AssertionError(f"not finished after {CALLS_MAX} calls")

    def _cut_everywhere(
        self,
        place: FaultyPlace,
        prepare: Callable[[Backend, str], object],
        act: Callable[[Backend, str], object],
        check: Callable[[Backend, str, bool], object],
    ) -> None:
        """prepare, then act with a power cut at its first call, its second and so on, then check(finished), each time
        with a folder of its own: a removal need not be durable."""
        for seed in range(SEEDS):
            for calls in range(CALLS_MAX):
                folder = f"cut/{seed}/{calls}"
                backend = place.open()
                backend.lock("maker")
                prepare(backend, folder)
                finished = False
                place.crash_at(calls)
                try:
                    act(backend, folder)
                    finished = True
                except Crash:
                    pass
                place.crash_at(None)
                place.cut_power(random.Random(seed * CALLS_MAX + calls))
                backend = place.open()
                backend.lock("checker")
                check(backend, folder, finished)
                backend.close()
                if finished:
                    break
            else:
                raise AssertionError(f"not finished after {CALLS_MAX} calls")

    def test_put_is_atomic(self, place: FaultyPlace) -> None:
        old, new = b"old " * 2000, b"new!" * 3000

        def prepare(backend: Backend, folder: str) -> None:
            backend.put(f"{folder}/a", old)

        def put(backend: Backend, folder: str) -> None:
            backend.put(f"{folder}/a", new)

        def replace_if(backend: Backend, folder: str) -> None:
            backend.replace_if(f"{folder}/a", old, new)

        def check(backend: Backend, folder: str, finished: bool) -> None:
            assert backend.get(f"{folder}/a") in ((new,) if finished else (old, new))
            backend.delete(f"{folder}/a")

        self._cut_everywhere(place, prepare, put, check)
        self._cut_everywhere(place, prepare, replace_if, check)

    def test_stream_is_atomic(self, place: FaultyPlace) -> None:
        parts = [b"one " * 1500, b"two " * 1500]

        def act(backend: Backend, folder: str) -> None:
            writer = backend.put_stream(f"{folder}/a")
            for part in parts:
                writer.write([part])
            writer.commit()

        def check(backend: Backend, folder: str, finished: bool) -> None:
            if finished or backend.list(f"{folder}/"):
                assert backend.get(f"{folder}/a") == b"".join(parts)

        self._cut_everywhere(place, lambda backend, folder: None, act, check)

    @pytest.mark.parametrize("way", ["put_if_absent", "create"])
    def test_one_winner_whatever_the_step(self, place: FaultyPlace, way: str) -> None:
        """A second caller comes in between any two steps of the first."""
        for calls in range(CALLS_MAX):
            name = f"race/{way}/{calls}"
            first, second = place.open(), place.open()
            outcomes: list[str] = []

            def attempt(backend: Backend, label: str, name: str = name, outcomes: list[str] = outcomes) -> None:
                try:
                    if way == "create":
                        backend.create(name, SIZE).close()
                    else:
                        backend.put_if_absent(name, label.encode())
                    outcomes.append(label)
                except Exists:
                    pass

            came = False

            def come_in(second: Backend = second, attempt: Callable[[Backend, str], None] = attempt) -> None:
                nonlocal came
                came = True
                attempt(second, "second")

            place.at_call(calls, come_in)
            attempt(first, "first")
            if not came:
                break
            assert len(outcomes) == 1, outcomes
            if way == "put_if_absent":
                assert first.get(name) == outcomes[0].encode()
        else:
            raise AssertionError(f"not finished after {CALLS_MAX} calls")

    def test_put_if_absent_is_atomic(self, place: FaultyPlace) -> None:
        new = b"new!" * 3000

        def act(backend: Backend, folder: str) -> None:
            backend.put_if_absent(f"{folder}/a", new)

        def check(backend: Backend, folder: str, finished: bool) -> None:
            if finished or backend.list(f"{folder}/"):
                assert backend.get(f"{folder}/a") == new

        self._cut_everywhere(place, lambda backend, folder: None, act, check)

    def test_create_is_atomic(self, place: FaultyPlace) -> None:
        def act(backend: Backend, folder: str) -> None:
            backend.create(f"{folder}/a", SIZE)

        def check(backend: Backend, folder: str, finished: bool) -> None:
            if finished or backend.list(f"{folder}/"):
                assert backend.list(f"{folder}/") == [Entry(f"{folder}/a", SIZE)]

        self._cut_everywhere(place, lambda backend, folder: None, act, check)

    def test_crashes_leave_no_litter(self, place: FaultyPlace) -> None:
        backend = place.open()
        backend.lock("first")
        usual_bytes = backend.used_bytes()
        backend.close()

        def act(backend: Backend, folder: str) -> None:
            backend.put(f"{folder}/a", bytes(SIZE))
            backend.create(f"{folder}/b", SIZE).close()

        def check(backend: Backend, folder: str, finished: bool) -> None:
            kept_bytes = sum(entry.size_bytes for entry in backend.list(""))
            assert backend.used_bytes() <= usual_bytes + kept_bytes
            for entry in backend.list(""):
                backend.delete(entry.name)

        self._cut_everywhere(place, lambda backend, folder: None, act, check)

    @pytest.mark.parametrize("way", WAYS_TO_WRITE)
    def test_synced_writes_are_durable(self, place: FaultyPlace, way: str) -> None:
        for seed in range(SEEDS):
            rng = random.Random(seed)
            content = rng.randbytes(SIZE)
            handle = place.open().create(f"log/{seed}", SIZE)
            for at in range(0, SIZE, 8 * KIB):
                getattr(handle, way)(at, views(content[at : at + 8 * KIB]))
            handle.sync()
            place.cut_power(rng)
            assert place.open().get(f"log/{seed}") == content

    def test_write_durable_covers_its_own_bytes(self, place: FaultyPlace) -> None:
        for seed in range(SEEDS):
            rng = random.Random(seed)
            handle = place.open().create(f"log/{seed}", SIZE)
            handle.write(0, views(bytes(SIZE)))
            handle.write(8 * KIB, views(b"x" * 8 * KIB))
            handle.write_durable(9 * KIB + 1, views(b"y" * 100, b"z" * 5000))
            handle.write(32 * KIB, views(b"x" * 8 * KIB))
            place.cut_power(rng)
            after = place.open().get(f"log/{seed}")
            assert len(after) == SIZE
            assert after[9 * KIB + 1 : 9 * KIB + 5101] == b"y" * 100 + b"z" * 5000

    def test_truncate_is_durable_with_the_next_sync(self, place: FaultyPlace) -> None:
        for seed in range(SEEDS):
            for durable in (False, True):
                name = f"log/{seed}/{int(durable)}"
                handle = place.open().create(name, SIZE)
                handle.write(0, views(b"body" * KIB))
                handle.truncate(4 * KIB)
                if durable:
                    handle.write_durable(0, views(b"BODY"))
                handle.sync()
                place.cut_power(random.Random(seed))
                assert place.open().get(name) == (b"BODY" if durable else b"body") + b"body" * (KIB - 1)

    def test_a_new_life_of_a_file_does_not_show_under_its_old_name(self, place: FaultyPlace) -> None:
        old, new = b"old!" * (SIZE // 4), b"new!" * (SIZE // 4)
        for seed in range(SEEDS * 4):
            rng = random.Random(seed)
            backend = place.open()
            backend.lock("me")
            handle = backend.create(f"old/{seed}/a", SIZE)
            handle.write(0, views(old))
            handle.sync()
            handle.close()
            backend.retire(f"old/{seed}/a")
            handle = backend.create(f"new/{seed}/b", SIZE)
            handle.write(0, views(new))
            handle.sync()
            place.cut_power(rng)
            backend = place.open()
            backend.lock("me")
            assert backend.get(f"new/{seed}/b") == new
            if backend.list(f"old/{seed}/"):
                assert backend.get(f"old/{seed}/a") == old
            third = backend.create(f"new/{seed}/c", SIZE)
            third.write(0, views(bytes(SIZE)))
            third.close()
            assert backend.get(f"new/{seed}/b") == new, "two objects share their bytes"
            backend.close()

    def test_retired_object_is_wholly_there_or_gone(self, place: FaultyPlace) -> None:
        content = b"body" * (SIZE // 4)

        def prepare(backend: Backend, folder: str) -> None:
            handle = backend.create(f"{folder}/a", SIZE)
            handle.write(0, views(content))
            handle.sync()
            handle.close()

        def act(backend: Backend, folder: str) -> None:
            backend.retire(f"{folder}/a")

        def check(backend: Backend, folder: str, finished: bool) -> None:
            if backend.list(f"{folder}/"):
                assert backend.get(f"{folder}/a") == content

        self._cut_everywhere(place, prepare, act, check)

    def test_a_crash_frees_the_lock(self, place: FaultyPlace) -> None:
        place.open().lock("victim")
        place.cut_power(random.Random(1))
        backend = place.open()
        assert backend.lock_note() is None
        backend.lock("heir")
        assert backend.lock_note() == "heir"

    def test_space_set_aside_stays_ours(self, place: FaultyPlace) -> None:
        backend = place.open()
        handle = backend.create("a", SIZE)
        place.leave_free(0)
        for at in range(0, SIZE, 4 * KIB):
            handle.write(at, views(b"x" * 4 * KIB))
        handle.write_durable(0, views(b"y" * 4 * KIB))
        handle.sync()
        assert backend.get("a") == b"y" * 4 * KIB + b"x" * (SIZE - 4 * KIB)

    def test_a_full_zone_changes_nothing(self, place: FaultyPlace) -> None:
        backend = place.open()
        backend.lock("me")
        backend.put("a/a", b"old")
        before, used_bytes = backend.list(""), backend.used_bytes()
        place.leave_free(SIZE // 2)
        with pytest.raises(NoSpace):
            backend.put("a/a", bytes(SIZE))
        with pytest.raises(NoSpace):
            backend.put_if_absent("a/b", bytes(SIZE))
        with pytest.raises(NoSpace):
            backend.create("a/c", SIZE)
        with pytest.raises(NoSpace):
            backend.create("a/c", SIZE // 4, reserve_bytes=SIZE // 2)
        writer = backend.put_stream("a/d")
        with pytest.raises(NoSpace):
            writer.write([bytes(SIZE)])
        writer.abort()
        assert backend.list("") == before
        assert backend.get("a/a") == b"old"
        assert backend.used_bytes() == used_bytes
        backend.create("a/c", SIZE // 4, reserve_bytes=SIZE // 4).close()

    def test_spare_files_make_room(self, place: FaultyPlace) -> None:
        backend = place.open()
        backend.lock("me")
        backend.put("warm", b"")
        for name in ("a", "b"):
            backend.create(name, SIZE).close()
        place.leave_free(0)
        for name in ("a", "b"):
            backend.retire(name)
        assert backend.free_bytes() >= 2 * SIZE
        backend.put("c", bytes(SIZE + SIZE // 2))
        assert backend.get("c") == bytes(SIZE + SIZE // 2)

    def test_a_full_zone_can_be_locked(self, place: FaultyPlace) -> None:
        backend = place.open()
        backend.lock("a long note of the first holder")
        backend.close()
        place.leave_free(0)
        backend = place.open()
        backend.lock("short")
        assert backend.lock_note() == "short"

    def test_errors_name_zone_call_and_errno(self, place: FaultyPlace) -> None:
        backend = place.open()
        handle = backend.create("a", SIZE)
        handle.write(0, views(b"x"))
        place.fail_syncs(1)
        with pytest.raises(ZoneFailed, match=r"sync.*/zone.*EIO"):
            handle.sync()
        place.fail_syncs(1)
        with pytest.raises(ZoneFailed, match=r"/zone.*EIO"):
            backend.put("b", b"x")

    def test_a_failed_put_shows_nothing_or_all(self, place: FaultyPlace) -> None:
        backend = place.open()
        backend.put("a", b"old")
        place.fail_syncs(1)
        with pytest.raises(ZoneFailed):
            backend.put("a", b"new")
        place.cut_power(random.Random(1))
        assert place.open().get("a") in (b"old", b"new")

    def test_uncached_reads_see_what_a_failed_sync_lost(self, place: FaultyPlace) -> None:
        lost = 0
        for seed in range(SEEDS):
            backend = place.open()
            handle = backend.create(f"log/{seed}", SIZE)
            handle.write(0, views(b"old!" * (SIZE // 4)))
            handle.sync()
            handle.write(0, views(b"new!" * (SIZE // 4)))
            place.fail_syncs(1)
            with pytest.raises(ZoneFailed):
                handle.sync()
            shown = read_uncached(handle, 0, SIZE)
            place.cut_power(random.Random(seed))
            assert place.open().get(f"log/{seed}") == shown
            lost += shown != b"new!" * (SIZE // 4)
        assert lost, "the storage never lost anything, so this proves nothing"

    def test_short_transfers_are_continued(self, place: FaultyPlace) -> None:
        backend = place.open()
        content = random.Random(3).randbytes(SIZE)
        handle = backend.create("a", SIZE)
        place.short_transfers(1000)
        handle.write(0, [memoryview(content)[at : at + 700] for at in range(0, SIZE, 700)])
        handle.write_durable(5, views(content[5:3000], content[3000:9000]))
        data = bytearray(SIZE)
        assert handle.read(0, [memoryview(data)[at : at + 1300] for at in range(0, SIZE, 1300)]) == SIZE
        assert data == content
        backend.put("b", content)
        assert backend.get("b") == content
        assert handle.read_nowait(0, [memoryview(data)]) == -1
        place.short_transfers(4096)
        assert read_uncached(handle, 100, SIZE) == content[100:]
