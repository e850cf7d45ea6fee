"""The sign of life on a terminal."""

import fcntl
import io
import os
import pty
import struct
import sys
import termios

import pytest

from nbdserver import cli_progress
from nbdserver.cli_progress import progress


def test_a_terminal_shows_what_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_progress, "SHOW_AFTER_SECONDS", 0.0)
    reading_end, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 80, 0, 0))
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        shown = b""
        with progress("creating disk"):
            while b"creating disk ... 00:0" not in shown:
                shown += os.read(reading_end, 1000)
        monkeypatch.undo()
        rest = os.read(reading_end, 1000)
    os.close(reading_end)
    assert rest.endswith(b"\r")


def test_anything_else_stays_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_progress, "SHOW_AFTER_SECONDS", 0.0)
    quiet = io.StringIO()
    monkeypatch.setattr(sys, "stderr", quiet)
    with progress("creating disk"):
        pass
    assert quiet.getvalue() == ""


def test_the_blocks_error_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    reading_end, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with pytest.raises(KeyError), progress("creating disk"):
            raise KeyError
    os.close(reading_end)
