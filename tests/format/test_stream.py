"""Streams of snapshots: what is written is read back, and nothing that was damaged on the way. STREAM.md."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from crc32c import crc32c

from objstore.errors import FormatError, NewerFormat
from objstore.format.stream import FRAME, HEADER, MAGIC, Begin, Decoder, Encoder, End, Kind, Range
from objstore.units import MIB

BEGIN = Begin(vdi="disk", size_bytes=10 * MIB + 512, base="", identity="ab:1", tag="größer", index=1, copies=2)
SECOND = Begin(vdi="disk", size_bytes=10 * MIB, base="ab:1", identity="ab:2")


def stream() -> bytes:
    encoder = Encoder()
    parts = [encoder.header, encoder.begin(BEGIN), *encoder.data(4096, b"d" * 8192)]
    parts += [encoder.zeros(Kind.HOLE, 3 * MIB, 4 * MIB), encoder.zeros(Kind.ZERO, 7 * MIB, 4096)]
    parts += [*encoder.data(10 * MIB, b"e" * 512), encoder.end(), encoder.begin(SECOND), encoder.end()]
    return b"".join([*parts, encoder.finish()])


def decoded(data: bytes, step: int = 1 << 20) -> list[Begin | Range | End]:
    decoder = Decoder()
    found = [item for at in range(0, len(data), step) for item in decoder.feed(data[at : at + step])]
    decoder.close()
    return found


@pytest.mark.parametrize("step", [1, 7, 4096, 1 << 20])
def test_what_is_written_is_read(step: int) -> None:
    assert decoded(stream(), step) == [
        BEGIN,
        Range(Kind.DATA, 4096, 8192, b"d" * 8192),
        Range(Kind.HOLE, 3 * MIB, 4 * MIB),
        Range(Kind.ZERO, 7 * MIB, 4096),
        Range(Kind.DATA, 10 * MIB, 512, b"e" * 512),
        End(data_bytes=8704, zero_bytes=4 * MIB + 4096),
        SECOND,
        End(data_bytes=0, zero_bytes=0),
    ]


def test_the_bytes_are_what_the_text_says() -> None:
    """Decoded here with nothing but STREAM.md."""
    data = stream()
    assert data[:12] == b"SHEEPDIF" + (1).to_bytes(4, "little")
    crc = crc32c(data[:12])
    assert int.from_bytes(data[12:16], "little") == crc
    at, kinds = 16, []
    while at < len(data):
        number = [
            int.from_bytes(data[at + a : at + b], "little") for a, b in ((0, 4), (4, 8), (8, 16), (16, 24), (24, 28))
        ]
        end = at + 32 + number[4]
        crc = crc32c(crc.to_bytes(4, "little") + data[at + 4 : end])
        assert crc == number[0]
        kinds.append(number[1])
        at = end
    assert kinds == [1, 2, 3, 4, 2, 5, 1, 5, 6]
    text = (Path(__file__).parents[2] / "objstore" / "format" / "STREAM.md").read_text()
    for kind in Kind:
        assert f"| {kind.value} | {kind.name} |" in text


def test_every_way_to_cut_it_short() -> None:
    data = stream()
    for end in range(len(data)):
        with pytest.raises(FormatError):
            decoded(data[:end])


def test_every_byte_counts() -> None:
    data = stream()
    rng = random.Random(1)
    for at in [*range(200), *rng.sample(range(200, len(data)), 400)]:
        changed = bytearray(data)
        changed[at] ^= 1 << rng.randrange(8)
        with pytest.raises(FormatError):
            decoded(bytes(changed))


def test_frames_out_of_place() -> None:
    """Left out, doubled, exchanged, or another stream's."""
    encoder = Encoder()
    frames = [encoder.begin(BEGIN)]
    frames += [b"".join(encoder.data(at * MIB, bytes([at]) * 4096)) for at in range(4)]
    frames += [encoder.end(), encoder.finish()]
    decoded(encoder.header + b"".join(frames))
    for wrong in (
        [*frames[:2], *frames[3:]],
        [*frames[:2], frames[1], *frames[2:]],
        [*frames[:1], frames[2], frames[1], *frames[3:]],
        [*frames[:-2], frames[-1]],
        [*frames, frames[-1]],
        [*frames[:-1], frames[0], *frames[-2:]],
    ):
        with pytest.raises(FormatError):
            decoded(encoder.header + b"".join(wrong))
    with pytest.raises(FormatError, match="bytes behind its end"):
        decoded(encoder.header + b"".join(frames) + b"\0")


def made(*parts: Callable[[Encoder], bytes | tuple[bytes, ...]]) -> bytes:
    encoder = Encoder()
    data = encoder.header
    for part in parts:
        frame = part(encoder)
        data += frame if isinstance(frame, bytes) else b"".join(frame)
    return data


@pytest.mark.parametrize(
    "data",
    [
        made(lambda e: e.finish(), lambda e: e.finish()),
        made(lambda e: e.end()),
        made(lambda e: e.data(0, b"x" * 4096)),
        made(lambda e: e.begin(BEGIN), lambda e: e.finish()),
        made(lambda e: e.begin(BEGIN), lambda e: e.begin(BEGIN)),
        made(lambda e: e.begin(BEGIN), lambda e: e.data(100, b"x" * 4096)),
        made(lambda e: e.begin(BEGIN), lambda e: e.data(8192, b"x" * 4096), lambda e: e.data(4096, b"x" * 4096)),
        made(lambda e: e.begin(BEGIN), lambda e: e.zeros(Kind.HOLE, 10 * MIB, 4096)),
        made(lambda e: e.begin(BEGIN), lambda e: e.zeros(Kind.HOLE, 0, 0)),
        made(lambda e: e.begin(BEGIN), lambda e: e._frame(Kind.DATA, 0, 4096, b"x") + b"x"),
        made(lambda e: e.begin(BEGIN), lambda e: e._frame(Kind.HOLE, 0, 4096, b"x") + b"x"),
        made(lambda e: e._frame(Kind.BEGIN, 0, 0, b"{}") + b"{}"),
        made(lambda e: e._frame(Kind.BEGIN, 0, 0, b"\xff") + b"\xff"),
        made(lambda e: e._frame(9, 0, 0, b"")),  # type: ignore[arg-type]
        made(lambda e: e.begin(Begin(vdi="d", size_bytes=0, base="", identity="a:1"))),
        made(lambda e: e.begin(Begin(vdi="d", size_bytes=1, base="", identity=""))),
        b"#!/bin/sh\nexit 0",
        MAGIC + bytes(8),
        HEADER.pack(MAGIC, 1, crc32c(HEADER.pack(MAGIC, 1, 0)[:12])) + FRAME.pack(0, 2, 0, 0, 1 << 31, 0),
    ],
)
def test_what_is_no_stream(data: bytes) -> None:
    with pytest.raises(FormatError, match="no stream of a disk, or it is damaged"):
        decoded(data)


def test_a_newer_version() -> None:
    start = HEADER.pack(MAGIC, 2, 0)[:12]
    with pytest.raises(NewerFormat, match="version 2, this program knows 1"):
        decoded(start + crc32c(start).to_bytes(4, "little"))
