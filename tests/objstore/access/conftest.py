"""One store of two zones, reached in each way that the library knows."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

import objstore
from nbdserver.control import ControlServer
from objstore.access.api import ServerStatus
from objstore.volume.settings import StoreSettings
from objstore.volume.store import Store, open_store

KINDS = ("local", "remote")


@pytest.fixture
def zones(tmp_path: Path) -> list[Path]:
    return [tmp_path / "a", tmp_path / "b"]


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """Short enough for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="sheepfold-") as directory:
        yield Path(directory) / "control.sock"


@asynccontextmanager
async def serving(zones: list[Path], socket_path: Path, settings: StoreSettings | None = None) -> AsyncIterator[Store]:
    """A store with a control server, in this loop."""
    store = await open_store(zones, settings=settings, create=True)
    server = ControlServer(store, lambda: ServerStatus(pid=1, listen=[], clients=0))
    try:
        await server.start(socket_path)
        yield store
    finally:
        await server.stop()
        await store.shutdown()


@pytest.fixture(params=KINDS)
async def store(
    request: pytest.FixtureRequest, zones: list[Path], socket_path: Path
) -> AsyncIterator[objstore.Connection]:
    """A connection to a new store."""
    async with AsyncExitStack() as stack:
        if request.param == "local":
            yield await stack.enter_async_context(objstore.connect(zones, create=True))
        else:
            await stack.enter_async_context(serving(zones, socket_path))
            yield await stack.enter_async_context(objstore.connect(socket=socket_path))


@pytest.fixture
async def vdi(store: objstore.Connection) -> AsyncIterator[objstore.VdiHandle]:
    """A fresh VDI of 8 MiB, open."""
    await store.create("disk", 8 << 20)
    async with store.open("disk") as vdi:
        yield vdi
