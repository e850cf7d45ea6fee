"""The oracle: what it must accept, and the lies that it must find."""

import random

import pytest

from tests.support.oracle import BLOCK_BYTES, Oracle, Violation, Write, block_content

BLOCKS = 8


class Disk:
    """An oracle and writes made through it; `image` builds what a server might show."""

    def __init__(self) -> None:
        self.oracle = Oracle(BLOCKS * BLOCK_BYTES)

    def send(self, first: int, count: int = 1) -> Write:
        return self.oracle.submit(first, count)

    def write(self, first: int, count: int = 1) -> Write:
        write = self.send(first, count)
        self.oracle.answer(write)
        return write

    def flush(self) -> None:
        self.oracle.flushed(self.oracle.flush_sent())

    def image(self, *log: Write) -> bytearray:
        image = bytearray(BLOCKS * BLOCK_BYTES)
        for write in log:
            start = write.first * BLOCK_BYTES
            image[start : start + write.count * BLOCK_BYTES] = write.payload()
        return image


def test_unflushed_writes_may_be_there_or_not_but_as_a_prefix() -> None:
    disk = Disk()
    writes = [disk.write(block) for block in range(4)]
    for cut in range(5):
        assert disk.oracle.check(disk.image(*writes[:cut])) == cut
    with pytest.raises(Violation, match="sent after its answer"):
        disk.oracle.check(disk.image(writes[0], writes[2]))


def test_flushed_write_must_be_there() -> None:
    disk = Disk()
    a = disk.write(1)
    disk.flush()
    b = disk.write(2)
    disk.oracle.check(disk.image(a))
    disk.oracle.check(disk.image(a, b))
    with pytest.raises(Violation, match=r"lost write 1 .*flushed"):
        disk.oracle.check(disk.image())


def test_write_with_fua_must_be_there_and_what_was_answered_before_it() -> None:
    disk = Disk()
    a = disk.write(1)
    b = disk.send(2)
    disk.oracle.answer(b, durable=True)
    disk.oracle.check(disk.image(a, b))
    for log in ((b,), (a,), ()):
        with pytest.raises(Violation):
            disk.oracle.check(disk.image(*log))


def test_a_flush_counts_only_what_was_answered_before_it_was_sent() -> None:
    disk = Disk()
    a = disk.send(1)
    sent = disk.oracle.flush_sent()
    disk.oracle.answer(a)
    disk.oracle.flushed(sent)
    disk.oracle.check(disk.image())


def test_older_version_than_the_flushed_one_is_found() -> None:
    disk = Disk()
    a = disk.write(1)
    disk.write(1)
    disk.flush()
    with pytest.raises(Violation, match="over a write that was sent after its answer"):
        disk.oracle.check(disk.image(a))


def test_concurrent_writes_have_any_order_but_one() -> None:
    disk = Disk()
    a, b = disk.send(0, 2), disk.send(0, 2)
    disk.oracle.answer(a)
    disk.oracle.answer(b)
    disk.flush()
    disk.oracle.check(disk.image(a, b))
    disk.oracle.check(disk.image(b, a))
    mixed = disk.image(a)
    mixed[BLOCK_BYTES : 2 * BLOCK_BYTES] = block_content(b.number, 1)
    with pytest.raises(Violation, match="in part, each over the other"):
        disk.oracle.check(mixed)


def test_in_flight_write_may_be_there_whole_or_not_at_all() -> None:
    disk = Disk()
    a = disk.send(0, 3)
    disk.oracle.check(disk.image())
    disk.oracle.check(disk.image(a))
    part = disk.image(a)
    part[:BLOCK_BYTES] = bytes(BLOCK_BYTES)
    with pytest.raises(Violation, match="in part"):
        disk.oracle.check(part)


def test_order_through_a_third_write_is_kept() -> None:
    """b was sent after a's answer; c, in flight all the time, can't be before a and after b."""
    disk = Disk()
    c = disk.send(0, 2)
    a = disk.write(0)
    b = disk.write(1)
    disk.flush()
    image = disk.image(b, c)
    image[:BLOCK_BYTES] = block_content(a.number, 0)
    with pytest.raises(Violation):
        disk.oracle.check(image)
    disk.oracle.check(disk.image(a, b, c))
    disk.oracle.check(disk.image(c, a, b))
    disk.oracle.check(disk.image(a, c, b))


def test_torn_and_misplaced_blocks_are_found() -> None:
    disk = Disk()
    a = disk.write(1)
    torn = disk.image(a)
    torn[BLOCK_BYTES + 512 : BLOCK_BYTES + 1024] = bytes(512)
    with pytest.raises(Violation, match="torn"):
        disk.oracle.check(torn)
    misplaced = disk.image()
    misplaced[:BLOCK_BYTES] = block_content(a.number, 1)
    with pytest.raises(Violation, match="foreign"):
        disk.oracle.check(misplaced)


def test_next_life_starts_from_what_survived() -> None:
    disk = Disk()
    a, b = disk.write(1), disk.write(1)
    disk.oracle.check(disk.image(a))
    disk.oracle.restart(disk.image(a))
    disk.oracle.check(disk.image(a))
    with pytest.raises(Violation, match="earlier life"):
        disk.oracle.check(disk.image(b))
    c = disk.write(2)
    assert disk.oracle.check(disk.image(a, c)) == 1


@pytest.mark.parametrize("seed", range(50))
def test_every_cut_of_a_log_is_accepted_and_a_lost_last_write_is_not(seed: int) -> None:
    """Random histories: a log takes writes in any order that agrees with their answers."""
    rng = random.Random(seed)
    disk = Disk()
    log: list[Write] = []
    flying: list[Write] = []
    durable_from = 0
    for _ in range(60):
        step = rng.random()
        if step < 0.5:
            first = rng.randrange(BLOCKS)
            flying.append(disk.send(first, rng.randint(1, BLOCKS - first)))
        elif step < 0.9 and flying:
            write = flying.pop(rng.randrange(len(flying)))
            log.append(write)
            disk.oracle.answer(write)
        else:
            disk.flush()
            durable_from = len(log)
    for cut in range(durable_from, len(log) + 1):
        disk.oracle.check(disk.image(*log[:cut]))
    disk.oracle.check(disk.image(*log, *flying))
    first = rng.randrange(BLOCKS)
    last = disk.write(first, rng.randint(1, BLOCKS - first))
    disk.flush()
    disk.oracle.check(disk.image(*log, last))
    with pytest.raises(Violation):
        disk.oracle.check(disk.image(*log))
