"""One store of two zones, reached in each way that the library knows."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

import objstore

KINDS = ("local",)


@pytest.fixture
def zones(tmp_path: Path) -> list[Path]:
    return [tmp_path / "a", tmp_path / "b"]


@pytest.fixture(params=KINDS)
async def store(request: pytest.FixtureRequest, zones: list[Path]) -> AsyncIterator[objstore.Connection]:
    """A connection to a new store."""
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(objstore.connect(zones, create=True))


@pytest.fixture
async def vdi(store: objstore.Connection) -> AsyncIterator[objstore.VdiHandle]:
    """A fresh VDI of 8 MiB, open."""
    await store.create("disk", 8 << 20)
    async with store.open("disk") as vdi:
        yield vdi
