"""The backend contract over every backend of ours, and over backends that break it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from objstore.errors import StoreError
from tests.contract.backend_contract import BackendContract
from tests.contract.backend_fault_contract import FaultContract
from tests.support.broken_backends import BROKEN, Broken
from tests.support.places import FakePlace, MemoryPlace, RealPlace, directory

RECYCLING = pytest.mark.parametrize("recycle_files_max", [0, 3], ids=["fresh", "recycled"])


class TestMemory(BackendContract):
    @pytest.fixture
    def place(self) -> MemoryPlace:
        return MemoryPlace()


@RECYCLING
class TestDirectory(BackendContract):
    @pytest.fixture
    def place(self, tmp_path: Path, recycle_files_max: int) -> Iterator[RealPlace]:
        place = RealPlace(str(tmp_path), recycle_files_max)
        yield place
        place.close()


@RECYCLING
class TestDirectoryOnFakeFileSystem(BackendContract, FaultContract):
    @pytest.fixture
    def place(self, recycle_files_max: int) -> FakePlace:
        return FakePlace(directory(recycle_files_max))


class TestBareFileSystem(BackendContract, FaultContract):
    """A file system that refuses everything that has another way, and answers EAGAIN when it likes."""

    @pytest.fixture
    def place(self) -> FakePlace:
        place = FakePlace(directory())
        place.fs.takes_nowait = place.fs.takes_dsync = place.fs.takes_direct = place.fs.takes_fallocate = False
        return place


class TestSlowCache(BackendContract):
    """A file system whose cache often misses."""

    @pytest.fixture
    def place(self) -> FakePlace:
        place = FakePlace(directory(3))
        place.fs.nowait_miss = 0.5
        return place


class _Whole(BackendContract, FaultContract):
    pass


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_the_contract_catches(broken: Broken) -> None:
    """The named test passes over the sound backend and fails over the broken one."""
    test = getattr(_Whole(), broken.caught_by)
    test(FakePlace(directory(broken.recycle_files_max)), *broken.args)
    with pytest.raises((AssertionError, StoreError, OSError, pytest.fail.Exception)):
        test(FakePlace(broken.make), *broken.args)
