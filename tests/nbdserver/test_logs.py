"""How log records look, and where they go."""

import json
import logging
import os
import re
import socket
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdserver import logs
from nbdserver.logs import JournalHandler, JsonFormatter, fields


def record(
    message: str, *args: object, level: int = logging.WARNING, error: Exception | None = None
) -> logging.LogRecord:
    info = (type(error), error, None) if error is not None else None
    return logging.LogRecord("nbdserver.server", level, __file__, 1, message, args, info)


def test_fields_are_what_messages_say() -> None:
    assert fields(record("refused export=%s seconds=%.3f n=%d%% of %s: %r", "disk", 1.5, 7, "x", KeyError("k"))) == {
        "export": "disk",
        "seconds": 1.5,
        "n": 7,
    }
    assert fields(record("no arguments at all 100%")) == {}
    assert fields(record("peer=%s", None)) == {"peer": None}
    assert fields(record("path=%s", Path("/srv"))) == {"path": "/srv"}


def test_json_lines() -> None:
    line = JsonFormatter().format(record("export can't be opened name=%s: %s\nthere", 'a\n"é', "why"))
    assert "\n" not in line
    found = json.loads(line)
    assert found["name"] == 'a\n"é'
    assert found["message"].endswith("why\nthere")
    assert (found["level"], found["logger"]) == ("warning", "nbdserver.server")
    assert found["time"].endswith("+00:00")
    found = json.loads(JsonFormatter().format(record("time=%s level=%s", "x", "y", error=ValueError("boom"))))
    assert found["level"] == "warning"
    assert "ValueError: boom" in found["exception"]


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as listening:
        listening.bind(str(tmp_path / "journal"))
        yield listening


def decoded(data: bytes) -> dict[str, str]:
    """What a journal makes of a datagram."""
    found = {}
    while data:
        separator = re.search(rb"[=\n]", data)
        assert separator is not None
        key, data = data[: separator.start()], data[separator.end() :]
        if separator[0] == b"=":
            value, _, data = data.partition(b"\n")
        else:
            (length,) = struct.unpack_from("<Q", data)
            value, data = data[8 : 8 + length], data[9 + length :]
        found[key.decode()] = value.decode()
    return found


def test_journal_entries(journal: socket.socket, tmp_path: Path) -> None:
    handler = JournalHandler(str(tmp_path / "journal"))
    try:
        handler.emit(record("slow request export=%s", "disk"))
        assert decoded(journal.recv(1 << 16)) == {
            "MESSAGE": "slow request export=disk",
            "PRIORITY": "4",
            "SYSLOG_IDENTIFIER": "sheepfold",
            "LOGGER": "nbdserver.server",
            "SHEEPFOLD_EXPORT": "disk",
        }
        handler.emit(record("two\nlines name=%s", "a=b\nPRIORITY=0", level=logging.ERROR, error=ValueError("boom")))
        found = decoded(journal.recv(1 << 16))
        assert found["MESSAGE"].startswith("two\nlines name=a=b\nPRIORITY=0\nValueError: boom")
        assert (found["PRIORITY"], found["SHEEPFOLD_NAME"]) == ("3", "a=b\nPRIORITY=0")
    finally:
        handler.close()


def test_a_journal_that_takes_nothing_costs_records_and_no_time(journal: socket.socket, tmp_path: Path) -> None:
    handler = JournalHandler(str(tmp_path / "journal"))
    try:
        while not handler.dropped:
            handler.emit(record("again"))
        handler.emit(record("again"))
        assert handler.dropped == 2
        journal.recv(1 << 16)
        handler.emit(record("at last"))
        assert handler.dropped == 0
        found: dict[str, str] = {}
        while found.get("MESSAGE") != "at last":
            found = decoded(journal.recv(1 << 16))
        assert found["SHEEPFOLD_DROPPED_BEFORE"] == "2"
    finally:
        handler.close()


def test_a_service_of_systemd_logs_to_the_journal_and_others_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[dict[str, object]] = []
    monkeypatch.setattr(logging, "basicConfig", lambda **how: made.append(how))
    with (tmp_path / "stderr").open("w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        found = os.fstat(stream.fileno())
        for environ, kind, handler in (
            ({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}, "auto", JournalHandler),
            ({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino + 1}"}, "auto", logging.StreamHandler),
            ({}, "auto", logging.StreamHandler),
            ({}, "journal", JournalHandler),
        ):
            logs.configure(kind, logging.INFO, environ)
            (used,) = made.pop()["handlers"]  # type: ignore[misc]
            assert type(used) is handler
            used.close()
        logs.configure("json", logging.INFO, {})
        (used,) = made.pop()["handlers"]  # type: ignore[misc]
        assert isinstance(used.formatter, JsonFormatter)
