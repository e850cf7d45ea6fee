"""Bytes that are wrong and carry right checksums: whatever they say, the check finds something and goes on."""

import random
import struct

import pytest
from crc32c import crc32c

from objstore.check.layout import PAGE
from objstore.check.report import Verdict
from tests.objstore.check.stores import CATALOG, CHECKPOINT, LOG, Checked, faults, used_store

ROUNDS = 40


@pytest.fixture
async def store() -> Checked:
    made = await used_store(zones=2, copies=2, rounds=2)
    made.repair()
    return made


def checksum(data: bytearray, start: int, length: int, at: int) -> None:
    data[start + at : start + at + 4] = bytes(4)
    data[start + at : start + at + 4] = crc32c(bytes(data[start : start + length])).to_bytes(4, "little")


def lie_in_segment(data: bytearray, dice: random.Random) -> None:
    """In the footer, the table, a record header or the header."""
    footer = len(data) - 128
    ops, sources, blocks, records = struct.unpack_from("<IIII", data, footer + 72)
    table_bytes = min(16 * ops + 8 * sources + 4 * blocks + 8 * records, footer)
    where = dice.randrange(4)
    if where == 0:
        data[footer + dice.randrange(12, 104)] ^= 1 << dice.randrange(8)
    elif where == 1:
        data[footer - 1 - dice.randrange(table_bytes)] ^= 1 << dice.randrange(8)
    elif where == 2:
        data[PAGE + dice.randrange(16, 300)] ^= 1 << dice.randrange(8)
        checksum(data, PAGE, PAGE, 12)
    else:
        data[dice.randrange(12, 130)] ^= 1 << dice.randrange(8)
        checksum(data, 0, PAGE, 8)
    data[footer + 88 : footer + 92] = crc32c(bytes(data[footer - table_bytes : footer])).to_bytes(4, "little")
    checksum(data, footer, 128, 8)


def lie_in_checkpoint(data: bytearray, dice: random.Random) -> None:
    """In the footer, the root, the segment table or the header."""
    footer = len(data) - 128
    root, roots, table, rows = struct.unpack_from("<QQQQ", data, footer + 36)
    where = dice.randrange(4)
    if where == 0:
        data[footer + dice.randrange(12, 68)] ^= 1 << dice.randrange(8)
    elif where == 1 and roots:
        data[root + dice.randrange(24 * roots)] ^= 1 << dice.randrange(8)
    elif where == 2 and rows:
        data[table + dice.randrange(32 * rows)] ^= 1 << dice.randrange(8)
    else:
        data[dice.randrange(12, 84)] ^= 1 << dice.randrange(8)
        checksum(data, 0, PAGE, 8)
    data[footer + 68 : footer + 72] = crc32c(bytes(data[root : root + 24 * roots])).to_bytes(4, "little")
    data[footer + 72 : footer + 76] = crc32c(bytes(data[table : table + 32 * rows])).to_bytes(4, "little")
    checksum(data, footer, 128, 8)


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("seed", range(2))
async def test_lies_end_in_findings(store: Checked, seed: int, everywhere: bool) -> None:
    dice = random.Random(seed)
    before = store.snapshot()
    found = 0
    for _ in range(ROUNDS):
        start, lie = dice.choice([(LOG, lie_in_segment), (CHECKPOINT, lie_in_checkpoint), (CATALOG, lie_in_segment)])
        name = dice.choice(store.names(start))
        lied = bytearray(before[0][name])
        lie(lied, dice)
        for zone in store.zones if everywhere else store.zones[:1]:
            zone.objects[name][:] = lied
        report = store.check()
        found += bool(faults(report))
        if not everywhere and start == LOG:
            assert report.verdict is not Verdict.DAMAGE, "the checkpoint says which copy is right"
        good = [bytes(zone.objects[name]) for zone in store.zones]
        store.repair()
        if not everywhere and start == CHECKPOINT and any("differs from" in f.text for f in report.findings):
            assert [bytes(zone.objects[name]) for zone in store.zones] == good, "guessed"
        for zone, objects in zip(store.zones, before, strict=True):
            zone.objects.clear()
            zone.objects.update({key: bytearray(data) for key, data in objects.items()})
    assert found > ROUNDS // 2
