"""The sign of life on a terminal."""

import fcntl
import io
import os
import pty
import re
import select
import struct
import sys
import termios

import pytest

from nbdserver import cli_progress
from nbdserver.cli_progress import progress, progress_bar


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


def test_a_bar_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_progress, "SHOW_AFTER_SECONDS", 0.0)
    reading_end, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 80, 0, 0))
    with os.fdopen(terminal, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        shown = b""
        with progress_bar("checking", 1 << 30) as on_progress:
            while not re.search(rb"checking: +[1-9][0-9]*%.*/1\.00G", shown):
                on_progress(10 << 20)
                if select.select([reading_end], [], [], 0.01)[0]:
                    shown += os.read(reading_end, 1000)
        monkeypatch.undo()
    os.close(reading_end)


def test_a_bar_stays_quiet_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = io.StringIO()
    monkeypatch.setattr(sys, "stderr", quiet)
    with progress_bar("checking", 100) as on_progress:
        on_progress(50)
    assert quiet.getvalue() == ""
