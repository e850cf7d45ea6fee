"""VDIs of a store over directories keep the contract of a volume."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from objstore.units import BLOCK_BYTES, KIB
from objstore.volume.base import Volume
from objstore.volume.settings import MODES, StoreSettings
from objstore.volume.store import open_store
from tests.contract.volume_contract import SIZE_BYTES, MakeVolume, VolumeContract, get, put


class TestVdi(VolumeContract):
    """Two zones, one mode after the other, segments so small that every test crosses some."""

    @pytest.fixture(params=MODES)
    def mode(self, request: pytest.FixtureRequest) -> str:
        mode: str = request.param
        return mode

    @pytest.fixture
    async def make(self, tmp_path: Path, mode: str) -> AsyncIterator[MakeVolume]:
        settings = StoreSettings(segment_bytes=512 * KIB)
        store = await open_store([tmp_path / "a", tmp_path / "b"], settings=settings, create=True)
        opened: list[Volume] = []

        async def make(size_bytes: int = SIZE_BYTES, *, read_only: bool = False) -> Volume:
            if read_only:
                pytest.skip("there are no read-only VDIs yet")
            name = f"disk{len(opened)}"
            await store.create_vdi(name, size_bytes, copies=2, mode=mode)
            volume = await store.open(name)
            opened.append(volume)
            return volume

        yield make
        for volume in opened:
            await store.close(volume)
        await store.shutdown()

    async def test_size_that_is_no_multiple_of_a_block(self, make: MakeVolume) -> None:
        volume = await make(3 * BLOCK_BYTES - 100)
        size = volume.size_bytes
        await put(volume, size - 10, b"0123456789")
        assert await get(volume, size - 12, 12) == b"\0\x000123456789"
        await volume.trim(2 * BLOCK_BYTES, size - 2 * BLOCK_BYTES)
        assert await get(volume, 0, size) == bytes(size)
        (extent,) = await volume.extents(0, size)
        assert extent == (size, True, True)
