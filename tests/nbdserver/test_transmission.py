"""Received bytes become the same requests however they are cut; broken framing ends the stream where it breaks."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdserver.transmission import IN_PLACE_BYTES_MAX, RECEIVE_BYTES
from nbdserver.wire.constants import Command, CommandFlag
from nbdserver.wire.requests import pack
from tests.nbdserver.machines import Receiver

PAYLOAD = int(CommandFlag.PAYLOAD_LEN)
LENGTHS = (0, 1, 512, 4096, IN_PLACE_BYTES_MAX, IN_PLACE_BYTES_MAX + 1, RECEIVE_BYTES, 2 * RECEIVE_BYTES + 77)
Decoded = tuple[int, int, int, int, int, bytes | None]


def stream_of(requests: list[Decoded], *, extended: bool) -> bytes:
    return b"".join(
        pack(command, flags, cookie, offset, length, extended=extended) + (payload or b"")
        for command, flags, cookie, offset, length, payload in requests
    )


@st.composite
def some_requests(draw: st.DrawFn, *, extended: bool) -> list[Decoded]:
    requests: list[Decoded] = []
    for cookie in range(draw(st.integers(1, 12))):
        offset = draw(st.integers(0, (1 << 64) - 1))
        if draw(st.booleans()):
            length = draw(st.sampled_from(LENGTHS))
            payload = bytes((cookie + 1,)) * length
            requests.append((Command.WRITE, PAYLOAD if extended else 0, cookie, offset, length, payload))
        else:
            command = draw(st.sampled_from((Command.READ, Command.FLUSH, Command.TRIM, 77)))
            length = draw(st.integers(0, (1 << (64 if extended else 32)) - 1))
            requests.append((command, 0, cookie, offset, length, None))
    return requests


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(stream), *(place % (len(stream) + 1) for place in places)})
    return [stream[start:end] for start, end in pairwise(edges)]


@pytest.mark.parametrize("extended", [False, True])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_cut_gives_the_same_requests(extended: bool, data: st.DataObject) -> None:
    requests = data.draw(some_requests(extended=extended))
    stream = stream_of(requests, extended=extended)
    places = data.draw(st.lists(st.integers(0, 1 << 22), max_size=12))
    receiver = Receiver(extended=extended)
    receiver.count_max = data.draw(st.sampled_from((1, 2, 256)))
    receiver.feed(cut(stream, places), park=data.draw(st.booleans()))
    assert receiver.requests == requests
    assert receiver.error is None


def test_byte_by_byte() -> None:
    requests: list[Decoded] = [(1, 0, 7, 512, 4, b"data"), (0, 0, 8, 0, 4096, None), (1, 0, 9, 0, 0, b"")]
    stream = stream_of(requests, extended=False)
    receiver = Receiver()
    receiver.feed([stream[index : index + 1] for index in range(len(stream))])
    assert receiver.requests == requests


def test_everything_received_at_once_is_one_batch() -> None:
    requests: list[Decoded] = [(Command.READ, 0, cookie, 0, 4096, None) for cookie in range(32)]
    receiver = Receiver()
    receiver.feed([stream_of(requests, extended=False)])
    assert receiver.batches == [32]


def test_batches_are_bounded_by_the_data_of_reads() -> None:
    lengths = (1 << 18, 1, 1 << 17, 1 << 17, 0, 1, 1 << 30, 5)
    requests: list[Decoded] = [(0, 0, cookie, 0, length, None) for cookie, length in enumerate(lengths)]
    receiver = Receiver()
    receiver.feed([stream_of(requests, extended=False)])
    assert receiver.requests == requests
    assert receiver.batches == [1, 2, 3, 1, 1]


@pytest.mark.parametrize("length", [10, IN_PLACE_BYTES_MAX + 1, 3 * RECEIVE_BYTES])
@pytest.mark.parametrize("piece", [1000, 1 << 30])
def test_payload_of_a_refused_write_is_dropped(length: int, piece: int) -> None:
    def refuses(command: int, flags: int, offset: int, length: int) -> bool:
        return offset == 13

    requests: list[Decoded] = [
        (1, 0, 1, 13, length, b"x" * length),
        (1, 0, 2, 14, length, b"y" * length),
        (0, 0, 3, 0, 1, None),
    ]
    stream = stream_of(requests, extended=False)
    receiver = Receiver(refuses=refuses)
    receiver.feed([stream[at : at + piece] for at in range(0, len(stream), piece)])
    dropped = receiver.requests[0]
    assert dropped[:5] == requests[0][:5]
    if length > IN_PLACE_BYTES_MAX and piece < length:
        assert dropped[5] is None
    assert receiver.requests[1:] == requests[1:]


def test_an_announced_length_asks_for_memory_once() -> None:
    receiver = Receiver()
    head = pack(Command.WRITE, 0, 1, 0, 1 << 26)
    machine = receiver.machine
    (view,) = machine.buffers()
    view[: len(head)] = head
    machine.received(len(head))
    assert machine.requests(256, 1 << 18) == []
    assert machine.wants_bytes == 1 << 26
    assert not machine.receiving_payload
    machine.park()
    assert machine.requests(256, 1 << 18) == []


@pytest.mark.parametrize("extended", [False, True])
def test_requests_in_front_of_a_bad_magic_come_out(extended: bool) -> None:
    good: list[Decoded] = [(0, 0, cookie, 0, 512, None) for cookie in range(3)]
    stream = stream_of(good, extended=extended) + bytes(32) + stream_of(good, extended=extended)
    receiver = Receiver(extended=extended)
    receiver.feed([stream])
    assert receiver.requests == good
    assert "magic" in str(receiver.error)
    receiver.drain()
    assert receiver.requests == good, "no request comes out after a protocol error"


def test_compact_and_extended_headers_do_not_mix() -> None:
    receiver = Receiver(extended=True)
    receiver.feed([pack(0, 0, 1, 0, 512) + bytes(4)])
    assert receiver.error is not None
    receiver = Receiver(extended=False)
    receiver.feed([pack(0, 0, 1, 0, 512, extended=True)])
    assert receiver.error is not None


@pytest.mark.parametrize("extended", [False, True])
def test_payload_over_the_limit(extended: bool) -> None:
    flags = PAYLOAD if extended else 0
    receiver = Receiver(extended=extended, payload_bytes_max=1000)
    stream = stream_of([(1, flags, 1, 0, 1000, b"x" * 1000)], extended=extended)
    receiver.feed([stream + pack(1, flags, 2, 0, 1001, extended=extended)])
    assert [request[2] for request in receiver.requests] == [1]
    assert "payload" in str(receiver.error)


def test_payload_flag_means_nothing_in_compact_headers() -> None:
    requests: list[Decoded] = [(0, PAYLOAD, 1, 0, 512, None), (1, PAYLOAD, 2, 0, 3, b"abc"), (3, 0, 3, 0, 0, None)]
    receiver = Receiver()
    receiver.feed([stream_of(requests, extended=False)])
    assert receiver.requests == requests


def test_any_extended_command_may_carry_a_payload() -> None:
    long = IN_PLACE_BYTES_MAX + 1
    requests: list[Decoded] = [
        (7, PAYLOAD, 1, 0, 12, b"e" * 12),
        (0, PAYLOAD, 2, 0, long, b"r" * long),
        (1, 0, 3, 0, 4096, None),
        (3, 0, 4, 0, 0, None),
    ]
    receiver = Receiver(extended=True, refuses=lambda command, flags, offset, length: command != Command.WRITE)
    stream = stream_of(requests, extended=True)
    receiver.feed([stream[:100], stream[100:]])
    assert receiver.requests[0] == requests[0]
    assert receiver.requests[1] == (0, PAYLOAD, 2, 0, long, None)
    assert receiver.requests[2:] == requests[2:]


def test_disconnect_ends_the_stream() -> None:
    requests: list[Decoded] = [(0, 0, 1, 0, 512, None)]
    stream = stream_of(requests, extended=False)
    receiver = Receiver()
    receiver.feed([stream + pack(Command.DISC, 0, 2, 0, 0) + stream + b"garbage"])
    assert receiver.requests == requests
    assert receiver.machine.disconnected
    assert receiver.error is None


def test_bytes_behind_the_handshake_come_first() -> None:
    requests: list[Decoded] = [(0, 0, 1, 0, 512, None), (1, 0, 2, 0, 3, b"abc")]
    stream = stream_of(requests, extended=False)
    receiver = Receiver()
    receiver.machine.feed(stream[:40])
    receiver.drain()
    receiver.machine.park()
    receiver.feed([stream[40:]])
    assert receiver.requests == requests


def test_random_bytes_never_get_past_the_magic() -> None:
    dice = random.Random(1)
    for _ in range(300):
        receiver = Receiver(extended=dice.random() < 0.5)
        receiver.feed([dice.randbytes(dice.randrange(28, 300))])
        assert receiver.requests == []
