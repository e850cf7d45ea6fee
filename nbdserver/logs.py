"""Where log records go and how they look: text for people, JSON lines or journald's own protocol for programs.

Messages name what they are about as `key=value`: those are the fields of a record, taken from the message's template,
so that nobody has to write them twice.
"""

import json
import logging
import os
import re
import socket
import struct
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

FORMATS: Final = ("auto", "text", "json", "journal")
JOURNAL_SOCKET: Final = "/run/systemd/journal/socket"
JOURNAL_MESSAGE_BYTES_MAX: Final = 32 << 10
"""A datagram may be longer, up to what the system's socket buffers hold; nothing of ours is."""
PRIORITIES: Final = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))
"""Least level of each priority of syslog(3)."""
_PLACEHOLDER: Final = re.compile(r"(?:(\w+)=)?%(?:%|[-#0 +]*\d*(?:\.\d+)?[a-zA-Z])")
_RESERVED: Final = frozenset(("time", "level", "logger", "message", "exception"))


def configure(kind: str, level: int, environ: Mapping[str, str] = os.environ) -> None:
    """Send records of `level` and above to stderr, or to the journal. kind: one of FORMATS; `auto` is the journal if
    stderr is connected to it (as systemd does), else text."""
    if kind == "auto":
        kind = "journal" if _stderr_is_journal(environ) else "text"
    handler: logging.Handler
    if kind == "journal":
        handler = JournalHandler()
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(
            JsonFormatter() if kind == "json" else logging.Formatter("sheepfold: %(levelname)s: %(message)s")
        )
    logging.basicConfig(level=level, handlers=[handler], force=True)


def _stderr_is_journal(environ: Mapping[str, str]) -> bool:
    """systemd.exec(5), JOURNAL_STREAM: device and inode of the stream that stderr was connected to."""
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return environ.get("JOURNAL_STREAM", "") == f"{found.st_dev}:{found.st_ino}"


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """What the record's message says as key=value: numbers and texts."""
    arguments = record.args if isinstance(record.args, tuple) else ()
    found: dict[str, Any] = {}
    at = 0
    for match in _PLACEHOLDER.finditer(str(record.msg)):
        if match.group(0).endswith("%%"):
            continue
        if at >= len(arguments):
            break
        if match.group(1):
            value = arguments[at]
            found[match.group(1)] = value if isinstance(value, bool | int | float | None) else str(value)
        at += 1
    return found


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (RFC 3339, UTC), level, logger, message, exception if there is one, fields."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        line.update({key: value for key, value in fields(record).items() if key not in _RESERVED})
        return json.dumps(line, ensure_ascii=True)


class JournalHandler(logging.Handler):
    """Speaks journald's native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL): each field by itself, SHEEPFOLD_KEY for
    those of the message. Never waits: records that the journal does not take at once are counted, and the next one that
    it takes says so."""

    def __init__(self, path: str = JOURNAL_SOCKET) -> None:
        super().__init__()
        self.dropped = 0
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        try:
            data = self._encoded(record)
        except (TypeError, ValueError):  # its message and arguments don't fit
            self.handleError(record)
            return
        try:
            self._socket.sendto(data, self._path)
            self.dropped = 0
        except OSError:
            self.dropped += 1

    def close(self) -> None:
        """See logging.Handler."""
        self._socket.close()
        super().close()

    def _encoded(self, record: logging.LogRecord) -> bytes:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        known: dict[str, object] = {
            "MESSAGE": message,
            "PRIORITY": next(number for level, number in PRIORITIES if record.levelno >= level),
            "SYSLOG_IDENTIFIER": "sheepfold",
            "LOGGER": record.name,
        }
        if self.dropped:
            known["SHEEPFOLD_DROPPED_BEFORE"] = self.dropped
        known.update({f"SHEEPFOLD_{key.upper()}": value for key, value in fields(record).items()})
        return b"".join(_entry(key, str(value)) for key, value in known.items())


def _entry(key: str, value: str) -> bytes:
    """KEY=value, or with a length in front of a value of several lines."""
    data = value.encode("utf-8", "backslashreplace")[:JOURNAL_MESSAGE_BYTES_MAX]
    if b"\n" in data:
        return key.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
    return key.encode() + b"=" + data + b"\n"
