"""The process marks itself for the kernel's writers, and keeps its memory."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from nbdserver import flusher
from nbdserver.flusher import lock_memory
from objstore.errors import InvalidRequest

MARK = """
import ctypes, os, threading
from nbdserver.flusher import mark_as_flusher
if {user}: os.setresuid({user}, {user}, {user})
libc = ctypes.CDLL(None)
found = []
marked = mark_as_flusher()
thread = threading.Thread(target=lambda: found.append(libc.prctl(58, 0, 0, 0, 0)))
thread.start()
thread.join()
kept = [line.split()[1] for line in open("/proc/self/status") if line.startswith(("CapEff", "CapPrm"))]
print(marked, found[0], *kept)
"""
LOCK = """
from nbdserver.flusher import lock_memory
lock_memory()
more = bytearray(8 << 20)
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmLck")][0])
"""


def said(program: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.split()


def may_mark() -> bool:
    return said(MARK.format(user=0))[0] == "True"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mark a process")
def test_threads_that_start_later_are_marked_too() -> None:
    if not may_mark():
        pytest.skip("root lacks CAP_SYS_RESOURCE here")
    marked, of_thread, *_ = said(MARK.format(user=0))
    assert (marked, of_thread) == ("True", "1")


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_without_permission_it_goes_on_unmarked_and_without_capabilities() -> None:
    marked, _, *capabilities = said(MARK.format(user=65534))
    assert marked == "False"
    assert [int(mask, 16) for mask in capabilities] == [0, 0]


@pytest.mark.skipif(os.geteuid() != 0, reason="locking all memory takes root, or a limit that tests don't have")
def test_all_memory_is_locked(tmp_path: Path) -> None:
    (locked_kib,) = said(LOCK)
    assert int(locked_kib) > 8 << 10


def test_a_user_who_may_lock_only_some_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flusher.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(flusher.resource, "getrlimit", lambda which: (65536, resource.RLIM_INFINITY))
    with pytest.raises(InvalidRequest, match="may lock 65536 bytes"):
        lock_memory()
