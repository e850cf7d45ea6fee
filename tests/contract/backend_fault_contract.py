"""What a backend must do when its storage fails, as tests: crashes, power cuts, full zones, errors, short transfers.

Beside backend_contract.py, for places that can do such things on request.
"""

import random
from collections.abc import Callable
from typing import Protocol

import pytest

from objstore.backend.base import Backend, Entry, ZoneFailed
from objstore.errors import Exists, NoSpace
from tests.contract.backend_contract import (
    KIB,
    SIZE,
    WAYS_TO_WRITE,
    Place,
    names,
    read_uncached,
    views,
)
from tests.support.fakefs import Crash

SEEDS = 12
CALLS_MAX = 200


class FaultyPlace(Place, Protocol):
    """Storage with faults on demand."""

    def crash_at(self, calls: int | None) -> None:
        """Raise Crash in the calls-th call to the storage from now on (0 is the next one); None: no more."""

    def at_call(self, calls: int, action: Callable[[], None]) -> None:
        """Run action inside the calls-th call to the storage from now on, once, just before that call takes effect."""

    def kill(self) -> None:
        """What runs is dead; everything it did stays visible."""

    def cut_power(self, rng: random.Random) -> None:
        """What is not durable may be lost, what runs is dead."""

    def leave_free(self, free_bytes: int) -> None:
        """From now on there is room for so much more."""

    def fail_syncs(self, count: int) -> None:
        """The next so many syncs of files fail with an I/O error, and keep what they like."""

    def short_transfers(self, bytes_max: int | None) -> None:
        """The storage moves at most so many bytes in a call; None: no limit."""


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
