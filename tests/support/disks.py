"""A VDI of a store in memory, with a model of what it must hold."""

import random

from objstore.log.checkpoint import checkpoint_folder
from objstore.log.segment import log_folder
from objstore.units import BLOCK_BYTES, MIB
from objstore.volume.vdi import Vdi
from tests.support.stepping import World

LOG = 1
"""The log of the first VDI of a store."""


class ModelDisk:
    """VDI "disk" of a World and the bytes that it must hold. Everything is done in whole blocks."""

    def __init__(self, world: World, *, blocks: int = 1024, seed: int = 1) -> None:
        self.world = world
        self.blocks = blocks
        self.dice = random.Random(seed)
        self.model = bytearray(blocks * BLOCK_BYTES)
        self.vdi: Vdi

    async def create(self, *, mode: str = "writeback-always", copies: int = 2) -> "ModelDisk":
        assert self.world.store is not None
        await self.world.store.create_vdi("disk", len(self.model), copies=copies, mode=mode)
        await self.open()
        return self

    async def open(self) -> None:
        assert self.world.store is not None
        vdi = await self.world.store.open("disk")
        assert isinstance(vdi, Vdi)
        self.vdi = vdi

    async def reopen(self, *, clean: bool) -> None:
        await (self.world.stop() if clean else self.world.kill())
        await self.world.open()
        await self.open()

    async def write(self, first: int, blocks: int = 1) -> None:
        """Fresh random data."""
        data = self.dice.randbytes(blocks * BLOCK_BYTES)
        await self.vdi.write(first * BLOCK_BYTES, memoryview(data))
        self.model[first * BLOCK_BYTES : first * BLOCK_BYTES + len(data)] = data

    async def trim(self, first: int, blocks: int) -> None:
        await self.vdi.trim(first * BLOCK_BYTES, blocks * BLOCK_BYTES)
        self._zero(first, blocks)

    async def reserve(self, first: int, blocks: int) -> None:
        await self.vdi.zero(first * BLOCK_BYTES, blocks * BLOCK_BYTES, no_hole=True)
        self._zero(first, blocks)

    def _zero(self, first: int, blocks: int) -> None:
        self.model[first * BLOCK_BYTES : (first + blocks) * BLOCK_BYTES] = bytes(blocks * BLOCK_BYTES)

    async def churn(self, changes: int, *, blocks_max: int = 24) -> None:
        """Random writes, and now and then a trim or zeros."""
        for _ in range(changes):
            blocks = self.dice.randint(1, blocks_max)
            first = self.dice.randrange(self.blocks - blocks)
            choice = self.dice.random()
            if choice < 0.9:
                await self.write(first, blocks)
            else:
                await (self.trim if choice < 0.95 else self.reserve)(first, blocks)

    async def read(self, first: int, blocks: int = 1) -> bytes:
        """As the network side reads."""
        length = blocks * BLOCK_BYTES
        into = memoryview(bytearray(length))
        zeros = self.vdi.read_now(first * BLOCK_BYTES, length, into)
        if zeros < 0:
            zeros = await self.vdi.read(first * BLOCK_BYTES, length, into)
        return bytes(length) if zeros == length else bytes(into)

    def expected(self, first: int, blocks: int = 1) -> bytes:
        return bytes(self.model[first * BLOCK_BYTES : (first + blocks) * BLOCK_BYTES])

    async def check(self) -> None:
        """Everything is as it must be."""
        step = MIB // BLOCK_BYTES
        for first in range(0, self.blocks, step):
            blocks = min(step, self.blocks - first)
            assert await self.read(first, blocks) == self.expected(first, blocks), f"contents differ behind {first}"

    def place(self, block: int) -> tuple[str, int]:
        """(object, offset in it) of a block's newest data."""
        entry = self.vdi.disk.map.lookup(block)
        segment = self.vdi.disk.env.segments[entry >> 12]
        return segment.name, (entry & 4095) * BLOCK_BYTES

    def damage(self, block: int, *, zones: list[int] | None = None) -> None:
        """Turn over one bit of a block's data, in some zones or all."""
        name, offset = self.place(block)
        self.world.damage(name, offset + 1000, zones=zones)

    @property
    def checkpoints(self) -> list[str]:
        return self.world.names(0, checkpoint_folder(LOG))

    @property
    def segments(self) -> list[str]:
        return self.world.names(0, log_folder(LOG))
