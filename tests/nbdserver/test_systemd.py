"""Word to the service manager, and what it hands over."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from nbdserver.service import ServePlan, places
from nbdserver.systemd import HandedSocket, handed_sockets, notify, watchdog_seconds
from objstore.errors import InvalidRequest
from tests.conftest import ExpectedWarnings


@pytest.mark.parametrize("abstract", [False, True])
def test_ready_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(5)
        manager.bind("\0" + path if abstract else path)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + path if abstract else path)
        notify("READY=1", "STATUS=all well")
        assert manager.recv(100) == b"READY=1\nSTATUS=all well"


@pytest.mark.parametrize("address", ["", "/nowhere/notify", "vsock:2:1"])
def test_no_manager_is_no_error(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("READY=1")


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_for_the_process_that_it_names(environ: dict[str, str], seconds: float | None) -> None:
    assert watchdog_seconds(environ, 7) == seconds


@pytest.mark.parametrize(
    "environ",
    [{}, {"LISTEN_FDS": "1"}, {"LISTEN_FDS": "1", "LISTEN_PID": "8"}, {"LISTEN_FDS": "x", "LISTEN_PID": "7"}],
)
def test_sockets_of_others_are_left_alone(environ: dict[str, str]) -> None:
    assert handed_sockets(environ, 7) == []
    assert environ == {}, "nobody whom we start takes them for its own"


def test_too_many_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="LISTEN_FDS=5000"):
        handed_sockets({"LISTEN_FDS": "5000", "LISTEN_PID": "7"}, 7)


def test_what_is_no_socket_is_named(tmp_path: Path) -> None:
    """In a process of its own, because the descriptors begin at 3."""
    program = (
        "import os; from nbdserver.systemd import handed_sockets\n"
        "os.dup2(os.open('/dev/null', os.O_RDONLY), 3)\n"
        "try: handed_sockets({'LISTEN_FDS': '1', 'LISTEN_PID': '7', 'LISTEN_FDNAMES': 'disks'}, 7)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.startswith("InvalidRequest descriptor 3 (disks) of LISTEN_FDS:")


def listening(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


def test_handed_sockets_take_the_place_of_the_default_listeners(tmp_path: Path) -> None:
    with listening(tmp_path / "ctl") as control, listening(tmp_path / "nbd") as nbd:
        handed = [HandedSocket("control", control), HandedSocket("nbd", nbd)]
        where = places(ServePlan(zones=[tmp_path]), handed)
        assert (where.control, where.control_socket) == (tmp_path / "ctl", control)
        assert (where.listeners, where.handed) == ([], [nbd])
        both = places(ServePlan(zones=[tmp_path], listen=["tcp://127.0.0.1:7"]), handed)
        assert [str(listener) for listener in both.listeners] == ["tcp://127.0.0.1:7"]
        assert both.handed == [nbd]
        with pytest.raises(InvalidRequest, match="two control sockets"):
            places(ServePlan(zones=[tmp_path], control=tmp_path / "mine"), handed)
        with pytest.raises(InvalidRequest, match="2 of the sockets"):
            places(ServePlan(zones=[tmp_path]), [handed[0], handed[0]])


def test_a_control_socket_has_a_path(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as control, pytest.raises(InvalidRequest, match="no Unix socket"):
        places(ServePlan(zones=[tmp_path]), [HandedSocket("control", control)])


def test_a_handed_socket_that_other_hosts_reach_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow(r"tcp://0\.0\.0\.0.* has no TLS")
    with socket.create_server(("0.0.0.0", 0)) as open_to_all, listening(tmp_path / "nbd") as local:
        places(ServePlan(zones=[tmp_path], control=tmp_path / "c"), [HandedSocket("nbd", local)])
        assert not caplog.records
        places(ServePlan(zones=[tmp_path], control=tmp_path / "c"), [HandedSocket("nbd", open_to_all)])
        assert "no TLS" in caplog.text


@pytest.mark.parametrize("name", ["nbd", "control"])
def test_a_handed_socket_that_does_not_listen_is_named(tmp_path: Path, name: str) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "nbd"))
        with pytest.raises(InvalidRequest, match=f"socket {name} that was handed over"):
            places(ServePlan(zones=[tmp_path], control=None), [HandedSocket(name, silent)])
