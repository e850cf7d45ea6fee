"""Fuzz targets for what is read from disks, from an administrator and from the control socket.

Bytes whose checksum is wrong are refused before anybody looks into them; so where a format has one, it is made right
again behind the mutation (`sealed`): a decoder must stand what a broken or hostile writer has sealed, too.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from crc32c import crc32c

from nbdserver.config import parse as parse_config
from nbdserver.identity import check_client
from nbdserver.listening import Listener
from nbdserver.metrics_http import parse_address
from objstore.access import api
from objstore.check.catalog import _unpack
from objstore.check.documents import document
from objstore.check.layout import Damaged
from objstore.errors import FormatError, InvalidRequest
from objstore.format.catalog import VdiEntry, decode_entry, encode_entry
from objstore.format.record import CRC_OFFSET
from objstore.format.stream import FRAME, HEADER, Decoder, Encoder, Kind, frame_crc
from objstore.log.regions import decode_region
from objstore.units import BLOCK_BYTES, parse_size
from tests.format.test_damage import FILES, WHOLE
from tests.format.test_stream import stream as whole_stream

Target = Callable[[bytes], None]
NAMES: Final = sorted(WHOLE)
CRC_AT: Final = {
    "segment header": 8,
    "checkpoint header": 8,
    "record header": CRC_OFFSET,
}
"""Where a page has its checksum."""
BODIES: Final = tuple(
    kind for kind in vars(api).values() if isinstance(kind, type) and issubclass(kind, msgspec.Struct)
)
BODY: Final = b'{"client":"uid:7","fence":true,"x":[[[{}]]]}'
DIRECTORY: Final = Path("/etc/sheepfold")


def formats(data: bytes) -> None:
    """A file or a part of one, sealed or not: decoded, or refused by FormatError."""
    name = NAMES[data[0] % len(NAMES)] if data else NAMES[0]
    sealing = len(data) > 1 and data[1] % 4 != 0
    _, decode = WHOLE[name]
    body = data[2:]
    with contextlib.suppress(FormatError):
        decode(sealed(name, body) if sealing else body)
    if name in ("superblock", "epoch"):
        with contextlib.suppress(Damaged, FormatError):
            document(sealed(name, body) if sealing else body, name)


def sealed(name: str, data: bytes) -> bytes:
    """The data with the checksum that belongs to it, where that is known."""
    if name in CRC_AT:
        at = CRC_AT[name]
        page = data[:BLOCK_BYTES].ljust(BLOCK_BYTES, b"\0")
        crc: int = crc32c(page[:at] + bytes(4) + page[at + 4 :])
        return page[:at] + crc.to_bytes(4, "little") + page[at + 4 :]
    if name == "catalog snapshot":
        whole = FILES["catalog-snapshot"]
        body = data[24:]
        return whole[:20] + crc32c(whole[:20] + body).to_bytes(4, "little") + body
    if name in ("superblock", "epoch"):
        body = data.partition(b"\n")[2][:-1]
        return b"SHEEPFOLD %s 1 crc32c=%08x\n" % (name.encode(), crc32c(body)) + body + b"\n"
    return data


def entries(data: bytes) -> None:
    """A catalog entry or a page of a map, which have no checksum of their own, by the store and by the check."""
    with contextlib.suppress(Damaged):
        _unpack(data)
    with contextlib.suppress(FormatError):
        decode_entry(data, len(data))
    with contextlib.suppress(FormatError):
        decode_region(data)


def bodies(data: bytes) -> None:
    """A body of the control API: a record that can be sent back, or refused."""
    kind = BODIES[data[0] % len(BODIES)] if data else BODIES[0]
    try:
        found = msgspec.json.decode(data[1:], type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return
    msgspec.json.encode(found)


def texts(data: bytes) -> None:
    """What an administrator types: taken, or refused by InvalidRequest."""
    text = data.decode(errors="surrogateescape")
    for convert in (parse_size, check_client, parse_address):
        with contextlib.suppress(InvalidRequest):
            convert(text)
    with contextlib.suppress(ValueError):
        Listener.parse(text)


def config(data: bytes) -> None:
    """A configuration that is TOML, whatever its keys and values are."""
    document: dict[str, Any] = {}
    keys = ("zones", "listen", "store", "server", "vdi", "tls", "metrics", "control", "nonsense")
    values = (
        [],
        "",
        1,
        -1,
        1e300,
        True,
        {},
        "64M",
        ["/srv"],
        {"disk": {"size": "1G"}},
        {"connections_max": 7},
        {"": {}},
    )
    for at in range(0, len(data) - 1, 2):
        document[keys[data[at] % len(keys)]] = values[data[at + 1] % len(values)]
    with contextlib.suppress(InvalidRequest):
        parse_config(document, DIRECTORY)


def stream(data: bytes) -> None:
    """A stream of snapshots, sealed or not: decoded, or refused by FormatError."""
    body = sealed_stream(data[1:]) if data[:1] > b"\x40" else data[1:]
    step = 1 + (data[0] if data else 0)
    decoder = Decoder()
    with contextlib.suppress(FormatError):
        for at in range(0, len(body), step * 16):
            for _ in decoder.feed(body[at : at + step * 16]):
                pass
        decoder.close()


def sealed_stream(data: bytes) -> bytes:
    """The data with the checksums that belong to it, as long as there are whole frames."""
    made = bytearray(data)
    if len(made) < HEADER.size:
        return data
    crc = crc32c(bytes(made[:12]))
    made[12:16] = crc.to_bytes(4, "little")
    at = HEADER.size
    while at + FRAME.size <= len(made):
        end = at + FRAME.size + FRAME.unpack_from(made, at)[4]
        crc = frame_crc(crc, bytes(made[at + 4 : at + FRAME.size]), bytes(made[at + FRAME.size : end]))
        made[at : at + 4] = crc.to_bytes(4, "little")
        at = end
    return bytes(made)


def _stream_seeds() -> list[bytes]:
    encoder = Encoder()
    deep = encoder._frame(Kind.BEGIN, 0, 0, text := b'{"x":' + b"[" * 3000 + b"]" * 3000 + b"}") + text
    return [b"\xff" + whole_stream(), b"\x10" + whole_stream(), b"\xff" + encoder.header + deep]


def _format_seeds() -> list[bytes]:
    deep = b"x\n" + b'{"x":' + b"[" * 3000 + b"]" * 3000 + b"}\n"
    seeds = [bytes((number, 1)) + WHOLE[name][0] for number, name in enumerate(NAMES)]
    return [*seeds, bytes((NAMES.index("superblock"), 1)) + deep]


def _entry_seeds() -> list[bytes]:
    made = VdiEntry(vdi_id=1, name="disk", log=2, size_bytes=1, copies=1, mode="unsafe", created=1.0, prealloc=False)
    entry, length = encode_entry(made)
    frame = WHOLE["map frame"][0]
    return [entry[:length], frame[12:], b"\x82\xa1x" + b"\x91" * 3000 + b"\x01"]


TARGETS: Final[Mapping[str, tuple[Target, Sequence[bytes]]]] = {
    "formats": (formats, _format_seeds()),
    "stream": (stream, _stream_seeds()),
    "entries": (entries, _entry_seeds()),
    "bodies": (
        bodies,
        [bytes((number,)) + b'{"client":"uid:7","fence":true,"x":[[[{}]]]}' for number in range(len(BODIES))],
    ),
    "texts": (texts, [b"tcp://[::1]:10809", b"unix:///run/a%2Fb", b"1.5T", b"certificate:a", b"vsock://any:1"]),
    "config": (config, [bytes(range(40)), bytes(range(120, 160))]),
}
