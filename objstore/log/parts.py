"""What a checkpoint is made of: everything that is taken in the loop turn in which it begins, and what comes of it."""

from __future__ import annotations

import asyncio
import itertools
from array import array
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from objstore.format.checkpoint import KEPT, LIVE, TABLE, CheckpointHeader
from objstore.log.blockmap import Frozen, PageRef
from objstore.log.regions import Region
from objstore.log.root import Root
from objstore.log.segment import Segment

ROWS_AT_ONCE: Final = 2048
"""Rows of the segment table made between two turns of the event loop: 2 us each."""


class Uncounted(NamedTuple):
    """Regions that large discards have dropped and that the live counters still have: in memory, and as pages."""

    regions: list[Region]
    refs: list[tuple[int, PageRef]]


class Owed(NamedTuple):
    """What a checkpoint is made of, all of the loop turn in which it begins.

    rows: segments of its table and their states; live: counters of the first of them. dead: segments that were dead.
    """

    header: CheckpointHeader
    frozen: Frozen
    rows: list[tuple[Segment, int]]
    live: array[int]
    dead: list[Segment]
    uncounted: Uncounted


class Written(NamedTuple):
    """A checkpoint that is durable. needs: the checkpoints that its pages lie in. moved: pages that it took over from
    old checkpoints: their former places."""

    root: Root
    needs: frozenset[int]
    moved: dict[int, PageRef]


def state_of(segment: Segment) -> int:
    """State of a segment that exists, in the table of a checkpoint that begins now."""
    return KEPT if segment.emptied else LIVE


async def make_table(rows: list[tuple[Segment, int]], live: array[int], gone: dict[int, int]) -> npt.NDArray[np.void]:
    """The segment table. rows: segments and states; live: counters of the first of them, the others have none; gone:
    blocks that those still have too many, by segment key."""
    table = np.zeros(len(rows), TABLE)
    for low in range(0, len(rows), ROWS_AT_ONCE):
        table[low : low + ROWS_AT_ONCE] = [
            (
                segment.number,
                segment.blocks,
                segment.seal_crc,
                max(0, counted - gone.get(segment.key, 0)),
                sum(1 << z for z in segment.zones),
                segment.generation,
                state,
            )
            for (segment, state), counted in zip(
                rows[low : low + ROWS_AT_ONCE],
                itertools.chain(live[low : low + ROWS_AT_ONCE], itertools.repeat(0)),
                strict=False,
            )
        ]
        await asyncio.sleep(0)
    return table
