"""What the fuzzers drive: each target takes any bytes and raises only where the code is wrong.

The first bytes of an input choose how the rest is cut and what the other side does; the rest is what a client sends.
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from nbdserver.handshake import OPTION_BYTES_MAX, Enter, Handshake, State
from nbdserver.wire import options as wire
from nbdserver.wire.constants import Command, Option, OptionReply, ProtocolError
from nbdserver.wire.requests import pack
from objstore.volume.base import VolumeInfo
from tests.fuzz import formats
from tests.nbdserver.machines import FIXED, Receiver, context_data, exports, info_data, option, replies
from tests.nbdserver.test_dispatch import STYLES, Harness
from tests.nbdserver.volumes import TestVolume

Target = Callable[[bytes], None]


def _pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def handshake(data: bytes) -> None:
    """Any bytes instead of a client: replies stay well-formed, memory bounded, and only ProtocolError comes out."""
    piece_bytes = 1 + (data[0] if data else 0)
    grants = len(data) < 2 or data[1] % 2 == 0
    machine = Handshake(exports("disk", "other"))
    machine.take_output()
    kept_bytes_max = wire.OPTION_HEADER.size + OPTION_BYTES_MAX + piece_bytes
    with contextlib.suppress(ProtocolError):
        for piece in _pieces(data[2:], piece_bytes):
            machine.receive(piece)
            while event := machine.step():
                if isinstance(event, Enter):
                    assert machine.state is State.OPENING
                    by_name = machine._option == Option.EXPORT_NAME
                    if grants:
                        machine.entered(VolumeInfo(event.name, 1 << 20, False, "in memory"))
                    else:
                        machine.refused(OptionReply.ERR_UNKNOWN, "not today")
                    output = machine.take_output()
                    assert by_name or replies(output)
            if machine.state is not State.TRANSMISSION:
                replies(machine.take_output())
                assert machine.state is State.CLOSED or len(machine._input) <= kept_bytes_max


def transmission(data: bytes) -> None:
    """Any bytes instead of requests give the same requests and the same end however they are cut."""
    piece_bytes = 1 + (data[0] if data else 0)
    extended = len(data) > 1 and data[1] % 2 == 1
    ends = []
    for size in (piece_bytes, 1 << 20):
        receiver = Receiver(
            extended=extended,
            payload_bytes_max=1 << 20,
            refuses=lambda command, flags, offset, length: command != Command.WRITE or offset % 2 == 1,
        )
        receiver.feed(_pieces(data[2:], size))
        heads = [request[:5] for request in receiver.requests]
        ends.append((heads, str(receiver.error), receiver.machine.disconnected))
        for command, flags, _, _, length, payload in receiver.requests:
            assert payload is None or len(payload) == length
            if command == Command.WRITE and not extended:
                assert length <= 1 << 20
            assert flags <= 0xFFFF
    assert ends[0] == ends[1]


def dispatch(data: bytes) -> None:
    """Whatever requests come out of any bytes, each gets exactly one reply that a client can parse."""
    style = STYLES[data[0] % 3] if data else STYLES[0]
    slow = len(data) > 1 and data[1] % 2 == 1
    extended = style == "extended"
    stream = b""
    dice = random.Random(data[:8])
    at = 2
    while at < len(data) and len(stream) < 1 << 16:
        part = data[at : at + 6].ljust(6, b"\0")
        at += 6
        length = int.from_bytes(part[2:4], "big")
        command = part[0] % 10
        if command == Command.DISC:
            continue
        flags = 1 << (part[1] % 8) if part[1] & 64 else 0
        if extended and command == Command.WRITE:
            flags |= 32
        offset = int.from_bytes(part[4:6], "big") << dice.choice((0, 4, 8, 48))
        with_payload = bool(flags & 32) if extended else command == Command.WRITE
        cookie = len(stream)
        stream += pack(command, flags, cookie, offset, length, extended=extended)
        stream += bytes((cookie & 0xFF,)) * length if with_payload else b""

    async def answer() -> None:
        volume = TestVolume(1 << 22)
        volume.slow = slow
        harness = Harness(volume, style)
        receiver = Receiver(extended=extended, refuses=harness.dispatch.refuses)
        receiver.feed([stream])
        assert receiver.error is None
        requests = [
            (*request[:5], None if request[5] is None else memoryview(request[5]), None)
            for request in receiver.requests
        ]
        for start in range(0, len(requests), 3):
            pieces = await harness.run(*requests[start : start + 3])
            answered = sorted(piece.cookie for piece in pieces if piece.done)
            assert answered == sorted(request[2] for request in requests[start : start + 3])

    asyncio.run(answer())


def _handshake_seeds() -> list[bytes]:
    start = bytes((40, 0)) + wire.CLIENT_FLAGS.pack(FIXED)
    contexts = context_data(b"disk", b"base:allocation", b"base:")
    options = [
        option(Option.STRUCTURED_REPLY),
        option(Option.EXTENDED_HEADERS),
        option(Option.LIST),
        option(Option.STARTTLS),
        option(Option.LIST_META_CONTEXT, contexts),
        option(Option.SET_META_CONTEXT, contexts),
        option(Option.INFO, info_data(b"disk", 0, 1, 2, 3)),
        option(99, b"unknown"),
    ]
    ends = [option(Option.GO, info_data(b"other", 3)), option(Option.EXPORT_NAME, b"disk"), option(Option.ABORT)]
    return [start + b"".join(options) + end for end in ends] + [start + one + ends[0] for one in options]


def _transmission_seeds() -> list[bytes]:
    seeds = []
    for extended in (False, True):
        flags = 32 if extended else 0
        stream = b"".join(
            pack(command, 0, command, 4096, 512, extended=extended) for command in Command if command not in (1, 2)
        )
        for length in (0, 512, 70_000):
            stream += pack(Command.WRITE, flags, 1, length, length, extended=extended) + bytes(length)
        seeds.append(bytes((200, int(extended))) + stream + pack(Command.DISC, 0, 9, 0, 0, extended=extended))
    return seeds


def _dispatch_seeds() -> list[bytes]:
    return [bytes((style, slow)) + bytes(range(240)) for style in range(3) for slow in range(2)]


TARGETS: Final[Mapping[str, tuple[Target, Sequence[bytes]]]] = {
    "handshake": (handshake, _handshake_seeds()),
    "transmission": (transmission, _transmission_seeds()),
    "dispatch": (dispatch, _dispatch_seeds()),
    **formats.TARGETS,
}
"""Each target with inputs that reach far into it."""


def mutated(seed: bytes, dice: random.Random) -> bytes:
    """A neighbour of an input: bytes flipped, cut out, doubled, numbers pushed to their edges."""
    data = bytearray(seed)
    for _ in range(dice.choice((1, 1, 2, 4, 16))):
        at = dice.randrange(len(data)) if data else 0
        action = dice.randrange(6)
        if action == 0 and data:
            data[at] ^= 1 << dice.randrange(8)
        elif action == 1 and data:
            data[at] = dice.choice((0, 1, 127, 128, 255))
        elif action == 2:
            del data[at : at + dice.choice((1, 4, 16, 64))]
        elif action == 3:
            data[at:at] = data[at : at + dice.choice((1, 16, 28, 32))]
        elif action == 4:
            data[at : at + 4] = dice.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\1\0\0"))
        else:
            data[at:at] = dice.randbytes(dice.randrange(1, 40))
    return bytes(data)
