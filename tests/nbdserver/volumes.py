"""Volumes that misbehave on order: slow, damaged, failing, closing."""

import asyncio
from collections.abc import Callable

from objstore.errors import Corrupt
from objstore.volume.base import Extent, always
from objstore.volume.memory import MemoryVolume


class TestVolume(MemoryVolume):
    """A volume in memory with switches.

    slow: nothing is possible at once. gate: every waiting call waits for it first. fails: raised by every call instead.
    bad: damaged ranges. calls: what the waiting methods were asked for, with the flags that matter.
    """

    __test__ = False

    def __init__(self, size_bytes: int = 1 << 24, *, name: str = "disk", read_only: bool = False) -> None:
        super().__init__(name, size_bytes, read_only=read_only)
        self.slow = False
        self.gate: asyncio.Event | None = None
        self.fails: Exception | None = None
        self.bad: list[tuple[int, int]] = []
        self.calls: list[str] = []

    def read_now(self, offset_bytes: int, length_bytes: int, into: memoryview) -> int:
        if self.fails is not None:
            raise self.fails
        if self.slow or self._damage(offset_bytes, length_bytes):
            into[:] = b"\xdd" * length_bytes
            return -1
        return super().read_now(offset_bytes, length_bytes, into)

    async def read(self, offset_bytes: int, length_bytes: int, into: memoryview) -> int:
        await self._pass("read")
        zeros = super().read_now(offset_bytes, length_bytes, into)
        damage = self._damage(offset_bytes, length_bytes)
        if damage:
            into[:] = self._data[offset_bytes : offset_bytes + length_bytes]
            for start, length in damage:
                into[start - offset_bytes : start - offset_bytes + length] = b"\xee" * length
            raise Corrupt("checksum differs in every copy", damage)
        return zeros

    def write_now(self, offset_bytes: int, data: memoryview) -> bool:
        if self.fails is not None:
            raise self.fails
        return not self.slow and super().write_now(offset_bytes, data)

    async def write(
        self, offset_bytes: int, data: memoryview, *, fua: bool = False, alive: Callable[[], bool] = always
    ) -> None:
        await self._pass(f"write fua={fua}")
        slow, self.slow = self.slow, False
        try:
            await super().write(offset_bytes, data, fua=fua, alive=alive)
        finally:
            self.slow = slow

    async def trim(
        self, offset_bytes: int, length_bytes: int, *, fua: bool = False, alive: Callable[[], bool] = always
    ) -> None:
        await self._pass(f"trim fua={fua}")
        await super().trim(offset_bytes, length_bytes, fua=fua, alive=alive)

    async def zero(
        self,
        offset_bytes: int,
        length_bytes: int,
        *,
        no_hole: bool = False,
        fast: bool = False,
        fua: bool = False,
        alive: Callable[[], bool] = always,
    ) -> None:
        await self._pass(f"zero no_hole={no_hole} fast={fast} fua={fua}")
        await super().zero(offset_bytes, length_bytes, no_hole=no_hole, fast=fast, fua=fua, alive=alive)

    async def flush(self) -> None:
        await self._pass("flush")

    async def cache(self, offset_bytes: int, length_bytes: int) -> None:
        await self._pass("cache")

    async def extents(self, offset_bytes: int, length_bytes: int, *, extents_max: int = 1 << 14) -> list[Extent]:
        await self._pass("extents")
        return await super().extents(offset_bytes, length_bytes, extents_max=extents_max)

    async def _pass(self, call: str) -> None:
        self.calls.append(call)
        if self.gate is not None:
            await self.gate.wait()
        if self.fails is not None:
            raise self.fails

    def _damage(self, offset: int, length: int) -> list[tuple[int, int]]:
        """The damaged parts of a range."""
        end = offset + length
        return [
            (max(at, offset), min(at + size, end) - max(at, offset))
            for at, size in self.bad
            if at < end and at + size > offset
        ]


async def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds; the loop runs meanwhile."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.002)
