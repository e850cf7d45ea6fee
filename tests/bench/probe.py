"""The few NBD messages that the benchmark sends by itself: is it serving, one read, one write, one flush. Blocking.

Spec: proto.md, "Newstyle negotiation", "Transmission phase". No structured replies.
"""

import contextlib
import socket
import struct
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
REQUEST_MAGIC: Final = 0x25609513
REPLY_MAGIC: Final = 0x67446698
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_INFO = 1, 2, 3, 6
REP_ACK, REP_SERVER = 1, 2
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH = 0, 1, 2, 3
POLL_SECONDS: Final = 0.001


class Probe:
    """One connection in the transmission phase."""

    def __init__(self, socket_path: Path, export: str, timeout_seconds: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(timeout_seconds)
            self._socket.connect(str(socket_path))
            magic, option_magic, flags = struct.unpack(">QQH", self._receive(18))
            if magic != NBDMAGIC or option_magic != IHAVEOPT or not flags & NO_ZEROES:
                raise ConnectionError("not a newstyle NBD server")
            name = export.encode()
            hello = struct.pack(">IQII", FIXED_NEWSTYLE | NO_ZEROES, IHAVEOPT, OPT_EXPORT_NAME, len(name))
            self._socket.sendall(hello + name)
            self.size_bytes, _ = struct.unpack(">QH", self._receive(10))
        except BaseException:
            self._socket.close()
            raise

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        self._call(CMD_READ, offset_bytes, length_bytes)
        return self._receive(length_bytes)

    def write(self, offset_bytes: int, data: bytes) -> None:
        self._call(CMD_WRITE, offset_bytes, len(data), data)

    def flush(self) -> None:
        self._call(CMD_FLUSH, 0, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self._send(CMD_DISC, 0, 0)
        self._socket.close()

    def _send(self, command: int, offset_bytes: int, length_bytes: int, data: bytes = b"") -> None:
        self._socket.sendall(struct.pack(">IHHQQI", REQUEST_MAGIC, 0, command, 1, offset_bytes, length_bytes) + data)

    def _call(self, command: int, offset_bytes: int, length_bytes: int, data: bytes = b"") -> None:
        self._send(command, offset_bytes, length_bytes, data)
        magic, error, _ = struct.unpack(">IIQ", self._receive(16))
        if magic != REPLY_MAGIC or error:
            raise ConnectionError(f"command {command} was answered with error {error}")

    def _receive(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            piece = self._socket.recv(length - len(data))
            if not piece:
                raise ConnectionError("the server hung up")
            data += piece
        return bytes(data)


def first_read(socket_path: Path, export: str, timeout_seconds: float) -> None:
    """Return as soon as the server has answered a read of its first block; TimeoutError."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(FileNotFoundError, ConnectionError),
            Probe(socket_path, export, timeout_seconds) as probe,
        ):
            probe.read(0, 4096)
            return
        time.sleep(POLL_SECONDS)
    raise TimeoutError(f"no server answered on {socket_path} within {timeout_seconds:.0f} s")


def _ask(socket_path: Path, option: int, payload: bytes) -> list[tuple[int, bytes]]:
    """Negotiate as far as that option; its replies before the acknowledgement."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(120)
        connection.connect(str(socket_path))
        with connection.makefile("rb") as stream:
            stream.read(18)
            hello = struct.pack(">IQII", FIXED_NEWSTYLE | NO_ZEROES, IHAVEOPT, option, len(payload))
            connection.sendall(hello + payload)
            replies = []
            while True:
                magic, _, kind, length = struct.unpack(">QIII", stream.read(20))
                data = stream.read(length)
                if magic != OPTION_REPLY_MAGIC or kind & 1 << 31:
                    raise ConnectionError(f"option {option} was answered with {kind:#x}: {data!r}")
                if kind == REP_ACK:
                    connection.sendall(struct.pack(">QII", IHAVEOPT, OPT_ABORT, 0))
                    return replies
                replies.append((kind, data))


def exports(socket_path: Path) -> list[str]:
    """The names that NBD_OPT_LIST gives."""
    return [data[4:].decode() for kind, data in _ask(socket_path, OPT_LIST, b"") if kind == REP_SERVER]


def info(socket_path: Path, export: str) -> None:
    """NBD_OPT_INFO of an export."""
    name = export.encode()
    _ask(socket_path, OPT_INFO, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))


def flush(socket_path: Path, export: str) -> None:
    """Flush through a connection of its own."""
    with Probe(socket_path, export, timeout_seconds=120) as probe:
        probe.flush()
