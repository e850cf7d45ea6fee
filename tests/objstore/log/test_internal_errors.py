"""An error of our own in a background task stops the log loudly instead of leaving its clients waiting."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from objstore.errors import Unavailable
from objstore.log.checkpoint import CheckpointWriter
from objstore.log.collect import Collector
from objstore.log.writer import LogWriter
from objstore.units import MIB
from objstore.volume.store import Store, open_store
from objstore.volume.vdi import Vdi
from tests.conftest import ExpectedWarnings


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store([tmp_path / "a", tmp_path / "b"], create=True)
    await store.create_vdi("disk", 16 * MIB)
    yield store
    with pytest.raises(Unavailable):
        await store.shutdown()


async def opened(store: Store) -> Vdi:
    vdi = await store.open("disk")
    assert isinstance(vdi, Vdi)
    await vdi.flush()
    await vdi.write(0, memoryview(b"x" * 4096))
    return vdi


async def write_on(vdi: Vdi, length_bytes: int) -> None:
    while True:
        await vdi.write(0, memoryview(b"y" * length_bytes), fua=True)


def broken(*_args: object) -> None:
    raise RuntimeError("a bug")


async def test_checkpoint(store: Store, monkeypatch: pytest.MonkeyPatch, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("internal error|log stopped|not everything")
    vdi = await opened(store)
    monkeypatch.setattr(CheckpointWriter, "add", broken)
    with pytest.raises(Unavailable):
        await vdi.keeper.checkpoint()
    with pytest.raises(Unavailable):
        await vdi.write(0, memoryview(b"y" * 4096))
    with pytest.raises(Unavailable):
        await vdi.flush()
    data = bytearray(4096)
    assert await vdi.read(0, 4096, memoryview(data)) == 0
    assert data == b"x" * 4096, "reads go on"
    assert store.vdi("disk").state == "failed"


async def test_collection(store: Store, monkeypatch: pytest.MonkeyPatch, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("internal error|log stopped|not everything")
    vdi = await opened(store)
    monkeypatch.setattr(Collector, "_victims", broken)
    vdi.collector.poke()
    with pytest.raises(Unavailable):
        await write_on(vdi, 4096)


async def test_preparing(store: Store, monkeypatch: pytest.MonkeyPatch, expected_warnings: ExpectedWarnings) -> None:
    expected_warnings.allow("internal error|log stopped|not everything")
    vdi = await opened(store)
    monkeypatch.setattr(LogWriter, "_prepare_one", broken)
    with pytest.raises(Unavailable):
        await write_on(vdi, MIB)
