"""The volume in memory keeps the contract; its source counts what is open."""

import pytest

from objstore.errors import NotFound
from objstore.volume.base import Volume, VolumeInfo
from objstore.volume.memory import MemorySource, MemoryVolume
from tests.contract.volume_contract import SIZE_BYTES, MakeVolume, VolumeContract, get, put


class TestMemoryVolume(VolumeContract):
    @pytest.fixture
    def make(self) -> MakeVolume:
        async def make(size_bytes: int = SIZE_BYTES, *, read_only: bool = False) -> Volume:
            return MemoryVolume("disk", size_bytes, read_only=read_only)

        return make

    async def test_size_that_is_no_multiple_of_a_block(self) -> None:
        volume = MemoryVolume("odd", 10_000)
        await put(volume, 9_990, b"0123456789")
        assert await get(volume, 8_192, 1_808) == bytes(1_798) + b"0123456789"
        await volume.trim(8_192, 1_808)
        assert await get(volume, 0, 10_000) == bytes(10_000)
        assert sum(extent.length_bytes for extent in await volume.extents(0, 10_000)) == 10_000
        into = memoryview(bytearray(10_000))
        await put(volume, 0, b"x" * 4096)
        assert await volume.read(0, 10_000, into) == 10_000 - 4096


async def test_source() -> None:
    source = MemorySource({"b": MemoryVolume("b", 4096), "a": MemoryVolume("a", 8192, read_only=True)})
    assert source.names() == ["a", "b"]
    assert source.peek("a") == VolumeInfo("a", 8192, True, "in memory")
    assert source.peek("c") is None
    with pytest.raises(NotFound):
        await source.open("c")
    volume = await source.open("b")
    assert source.open_count == 1
    await source.close(volume)
    assert source.open_count == 0
