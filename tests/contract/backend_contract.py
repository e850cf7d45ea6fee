"""What every backend must do, as tests over `objstore.backend.base`.

`BackendContract` needs a fixture `place`; what storage that can lose power, run full and fail must do besides is in
backend_fault_contract.py. Each test takes the place alone, so that tests/objstore/backend/test_contract.py can also run
them over broken backends.
"""

import itertools
import random
import sys
import threading
from collections.abc import Callable
from typing import Protocol

import pytest

from objstore.backend.base import Backend, Conflict, Entry, Handle
from objstore.errors import Busy, Exists, InvalidRequest, NoSpace, NotFound

KIB = 1024
SIZE = 64 * KIB
THREADS = 8


class Place(Protocol):
    """Storage that any number of backends look at, as several processes look at one directory."""

    def open(self) -> Backend: ...


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
