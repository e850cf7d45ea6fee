"""`sheepfold serve` and its sisters as processes, over real zones, sockets and signals."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbdserver import cli_admin
from nbdserver.cli import main
from nbdserver.listening import Listener
from nbdserver.service import Places, ServePlan, exposed, places
from nbdserver.tls import TlsSettings
from objstore.errors import Busy, InvalidRequest
from objstore.units import MIB
from objstore.volume.settings import StoreSettings
from tests.conftest import ExpectedWarnings
from tests.support.certificates import certificates
from tests.support.nbd_client import attached, connected
from tests.support.nbd_spec import Option, Rep

BLOCK = bytes(range(256)) * 16


@pytest.fixture(autouse=True)
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A session's directory for sockets, with a path short enough for their names."""
    with tempfile.TemporaryDirectory(prefix="sheepfold-") as directory:
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        for name in ("SHEEPFOLD_CONFIG", "RUNTIME_DIRECTORY", "NOTIFY_SOCKET"):
            monkeypatch.delenv(name, raising=False)
        yield Path(directory)


@pytest.fixture
def zones(tmp_path: Path) -> list[str]:
    return [str(tmp_path / name) for name in ("a", "b", "c")]


class Serving:
    """A server process and where to reach it."""

    def __init__(self, process: "subprocess.Popen[str]", socket_path: Path) -> None:
        self.process = process
        self.address = f"unix://{socket_path}"

    def exports(self, count: int) -> list[Any]:
        """Its first lines: one JSON object per export. Ends early if the server does."""
        assert self.process.stdout is not None
        return [json.loads(line) for line in (self.process.stdout.readline() for _ in range(count)) if line]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Exit code and what it had to say on stderr."""
        self.process.send_signal(number)
        _, complaints = self.process.communicate(timeout=60)
        return self.process.returncode, complaints


@contextmanager
def serving(tmp_path: Path, zones: list[str], *more: str) -> Iterator[Serving]:
    """`sheepfold serve` on a Unix socket; killed at the end if it still runs."""
    socket_path = tmp_path / "nbd.sock"
    command = [sys.executable, "-m", "nbdserver", "serve", "--json", "--listen", f"unix://{socket_path}", *more]
    command += [word for zone in zones for word in ("--zone", zone)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield Serving(process, socket_path)
    finally:
        process.kill()
        process.communicate()


def sheepfold(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """Run a command of the client side in this process; its JSON."""
    assert main([*arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run a command that must fail with one line; exit code and line."""
    code = main(arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return code, captured.err


async def test_from_empty_directories_to_a_clean_stop_and_back(
    tmp_path: Path, runtime: Path, zones: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(tmp_path, zones, "--vdi", "disk:64M", "--vdi", "odd:4097", "--copies", "2") as server:
        first, second = server.exports(2)
        assert first == {
            "export": "disk",
            "size_bytes": 64 * MIB,
            "uris": [f"nbd+unix:///disk?socket={tmp_path}/nbd.sock"],
        }
        assert (second["export"], second["size_bytes"]) == ("odd", 4097)
        async with attached(server.address, "disk") as client:
            await client.write(4096, BLOCK)
            await client.flush()
            status = await asyncio.to_thread(sheepfold, capsys, "status", "--zone", zones[2])
            assert status["server"]["pid"] == server.process.pid
            assert status["server"]["clients"] == 1
            assert status["store"]["health"] == "ok"
            assert [zone["path"] for zone in status["store"]["zones"]] == zones
            shown = await asyncio.to_thread(sheepfold, capsys, "vdi", "info", "disk", "--zone", zones[0])
            assert (shown["copies"], shown["attached"], shown["live_bytes"]) == (2, 1, 4096)
            code, line = await asyncio.to_thread(fails, capsys, "vdi", "delete", "disk", "--zone", zones[0])
            assert code == 5
            assert "'disk'" in line
        created = await asyncio.to_thread(sheepfold, capsys, "vdi", "create", "new", "1M", "--zone", zones[1])
        assert created["copies"] == 3
        async with connected(server.address) as client:
            assert [name for name, _ in await client.exports()] == ["disk", "new", "odd"]
        assert server.stop() == (0, "")
    assert not (tmp_path / "nbd.sock").exists()
    assert list((runtime / "sheepfold").iterdir()) == []

    offline = await asyncio.to_thread(sheepfold, capsys, "status", "--zone", zones[1])
    assert offline["server"] is None
    assert offline["store"]["unclean_stop"] is None
    deleted = await asyncio.to_thread(sheepfold, capsys, "vdi", "delete", "odd", "--zone", zones[1])
    assert deleted == {"deleted": "odd"}
    created = await asyncio.to_thread(
        sheepfold, capsys, "vdi", "create", "off", "1K", "--mode", "unsafe", "--zone", zones[1]
    )
    assert created["mode"] == "unsafe"

    with serving(tmp_path, zones[1:2], "--vdi", "disk:128M") as server:
        assert [line["export"] for line in server.exports(3)] == ["disk", "new", "off"]
        async with attached(server.address, "disk") as client:
            assert await client.read(4096, 4096) == BLOCK
        code, complaints = server.stop(signal.SIGINT)
    assert code == 0
    assert f"VDI disk has {64 * MIB} bytes" in complaints


async def test_after_kill_the_next_server_takes_the_place(
    tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(tmp_path, zones, "--vdi", "disk:64M", "--default", "disk") as server:
        server.exports(1)
        async with attached(server.address, "") as client:
            await client.write(0, BLOCK)
            await client.flush()
        assert server.stop(signal.SIGKILL) == (-signal.SIGKILL, "")
    assert (tmp_path / "nbd.sock").exists()
    before = _objects(zones[0])
    for _ in range(2):
        status = await asyncio.to_thread(sheepfold, capsys, "status", "--zone", zones[0])
        assert "may be lost" in status["store"]["unclean_stop"], "looking at it does not make it forgotten"
        assert await asyncio.to_thread(sheepfold, capsys, "vdi", "info", "disk", "--zone", zones[0])
    assert _objects(zones[0]) == before
    with serving(tmp_path, zones) as server:
        server.exports(1)
        async with attached(server.address, "disk") as client:
            assert await client.read(0, 4096) == BLOCK
        assert server.stop() == (0, "")


def _objects(zone: str) -> dict[Path, bytes]:
    """What the format knows of a zone: without the lock, and what was under construction when its owner was killed."""
    files = [path for path in Path(zone).rglob("*") if path.is_file() and path.name != "lock"]
    return {path: path.read_bytes() for path in files if path.relative_to(zone).parts[0] != "tmp"}


async def test_missing_zones_are_named_and_force_does_without_them(
    tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(tmp_path, zones, "--vdi", "disk:64M", "--copies", "3") as server:
        server.exports(1)
        async with attached(server.address, "disk") as client:
            await client.write(0, BLOCK)
            await client.flush()
        assert server.stop(signal.SIGKILL) == (-signal.SIGKILL, "")
    away = [Path(zone) for zone in zones[1:]]
    for zone in away:
        zone.rename(f"{zone}.away")
    code, line = await asyncio.to_thread(fails, capsys, "status", "--zone", zones[0])
    assert code == 7
    assert zones[1] in line
    assert zones[2] in line
    assert "--force" in line
    with serving(tmp_path, zones[:1], "--force") as server:
        server.exports(1)
        async with attached(server.address, "disk") as client:
            assert await client.read(0, 4096) == BLOCK
        code, complaints = server.stop()
        assert code == 0
        assert "may be on zones that are missing" in complaints
        assert zones[2] in complaints
    for zone in away:
        Path(f"{zone}.away").rename(zone)
    with serving(tmp_path, zones[:1]) as server:
        server.exports(1)
        async with attached(server.address, "disk") as client:
            assert await client.read(0, 4096) == BLOCK
        server.stop()


async def test_a_stop_with_a_client_attached_closes_its_connection_in_order(tmp_path: Path, zones: list[str]) -> None:
    with serving(tmp_path, zones, "--vdi", "disk:64M", "--mode", "writethrough") as server:
        server.exports(1)
        async with attached(server.address, "disk") as client:
            await client.write(0, BLOCK)
            server.process.send_signal(signal.SIGTERM)
            await client.expect_orderly_close()
        _, complaints = await asyncio.to_thread(server.process.communicate)
        assert (server.process.returncode, complaints) == (0, "")


def test_a_second_server_is_refused_and_the_first_is_named(tmp_path: Path, zones: list[str]) -> None:
    with serving(tmp_path, zones, "--vdi", "disk:1M") as first:
        first.exports(1)
        with serving(tmp_path, zones) as second:
            _, complaints = second.process.communicate()
        assert second.process.returncode == 5
        assert complaints.count("\n") == 1
        assert str(first.process.pid) in complaints
        assert first.stop() == (0, "")


def test_a_foreign_directory_is_refused_and_left_as_it_was(tmp_path: Path, zones: list[str]) -> None:
    foreign = Path(zones[1])
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    with serving(tmp_path, zones, "--vdi", "disk:1M") as server:
        assert server.exports(1) == []
        _, complaints = server.process.communicate()
        assert server.process.returncode == 2
    assert complaints.count("\n") == 1
    assert zones[1] in complaints
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("more", "code", "named"),
    [
        (("--default", "nope"), 2, "'nope'"),
        (("--listen", "udp://127.0.0.1:1"), 2, "udp://127.0.0.1:1"),
        (("--listen", "tcp://127.0.0.1:65536"), 2, "tcp://127.0.0.1:65536"),
        (("--listen", "unix:///nowhere/nbd.sock"), 1, "unix:///nowhere/nbd.sock"),
        (("--control", "/dev/null"), 2, "/dev/null"),
        (("--copies", "4", "--vdi", "disk:1M"), 2, "4"),
    ],
)
def test_what_cannot_be_served_is_named(
    tmp_path: Path, zones: list[str], more: tuple[str, ...], code: int, named: str
) -> None:
    with serving(tmp_path, zones, *more) as server:
        _, complaints = server.process.communicate()
    assert server.process.returncode == code
    assert complaints.count("\n") == 1
    assert complaints.startswith("sheepfold: error: ")
    assert named in complaints


def test_a_configuration_file_says_it_all(tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sheepfold.toml"
    path.write_text(
        'zones = ["a", "b", "c"]\ndefault = "disk"\n[vdi.disk]\nsize = "1M"\nmode = "unsafe"\n'
        "[server]\nextended_headers = false\n"
    )
    with serving(tmp_path, [], "--config", str(path), "--vdi", "second:1K") as server:
        assert [line["export"] for line in server.exports(2)] == ["disk", "second"]
        vdis = sheepfold(capsys, "vdi", "list", "--config", str(path))
        assert [(vdi["name"], vdi["mode"]) for vdi in vdis] == [("disk", "unsafe"), ("second", "writeback")]
        assert server.stop() == (0, "")


def test_the_service_manager_hears_of_start_and_stop(
    tmp_path: Path, zones: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with serving(tmp_path, zones, "--vdi", "disk:1M") as server:
            server.exports(1)
            assert manager.recv(100) == b"READY=1"
            assert manager.recv(100) == b"STATUS=1 VDIs, 0 connections"
            assert server.stop() == (0, "")
            assert manager.recv(100).startswith(b"STOPPING=1\nSTATUS=")


def test_commands_for_people(tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with serving(tmp_path, zones, "--vdi", "disk:1M") as server:
        server.exports(1)
        for arguments, words in (
            (["status"], ["health:", "ok", f"process {server.process.pid}", server.address, zones[2]]),
            (["vdi", "list"], ["NAME", "disk", "1M", "writeback"]),
            (["vdi", "info", "disk"], ["1M (1048576 bytes)", "closed"]),
            (["vdi", "create", "x", "1.5K"], ["1.5K (1536 bytes)"]),
            (["vdi", "delete", "x"], ["deleted x"]),
            (["vdi", "damage", "disk"], ["no damage of disk is known"]),
            (["scrub", "--follow"], ["copies checked, 0 bad, 0 replaced"]),
            (["scrub"], ["0 bad"]),
            (["zone", "list"], ["WEIGHT", "in", zones[1]]),
            (["zone", "set-weight", "2", "7.5"], ["7.5"]),
            (["recovery"], ["copies"]),
        ):
            assert main([*arguments, "--zone", zones[0]]) == 0
            shown = capsys.readouterr().out
            assert all(word in shown for word in words), shown


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("vdi", "info", "nope"), 3, "'nope'"),
        (("vdi", "delete", "nope"), 3, "'nope'"),
        (("vdi", "damage", "nope"), 3, "'nope'"),
        (("vdi", "set-copies", "disk", "9"), 2, "9"),
        (("zone", "drain", "nowhere"), 3, "'nowhere'"),
        (("zone", "remove", "0"), 2, "drain it first"),
        (("zone", "set-weight", "0", "-1"), 2, "-1"),
        (("recovery", "--rate", "5"), 2, "5 bytes a second"),
        (("vdi", "create", "disk", "1M"), 4, "'disk'"),
        (("vdi", "create", "x", "1M", "--copies", "9"), 2, "9"),
        (("vdi", "create", "x", "8192T", "--prealloc"), 6, "8192T"),
    ],
)
def test_the_same_error_with_and_without_a_server(
    tmp_path: Path,
    zones: list[str],
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    named: str,
) -> None:
    with serving(tmp_path, zones, "--vdi", "disk:1M") as server:
        server.exports(1)
        online = fails(capsys, *arguments, "--zone", zones[0])
        assert server.stop() == (0, "")
    assert online[0] == code
    assert named in online[1]
    offline = fails(capsys, *arguments, "--zone", zones[0])
    assert offline[0] == code
    assert without_free_space(offline[1]) == without_free_space(online[1])


def without_free_space(line: str) -> str:
    """The line without the one thing in it that other processes change."""
    return re.sub(r"[\d.]+[KMGT] free", "free", line)


def flip(zone: str, *, bit: int = 4) -> str:
    """Turn over one bit of the first data block in the newest sealed segment of the first VDI; its name."""
    for path in sorted(Path(zone, "log", "000001").iterdir(), reverse=True):
        data = bytearray(path.read_bytes())
        if data[-128:-120] == b"SHEEPDIR":
            data[8192 + 100] ^= bit
            path.write_bytes(data)
            return path.name
    raise AssertionError("nothing is sealed")


async def test_scrub_replaces_what_rotted_and_names_what_is_lost(
    tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str], expected_warnings: ExpectedWarnings
) -> None:
    expected_warnings.allow("a copy is bad, replaced")
    with serving(tmp_path, zones, "--vdi", "disk:1M") as server:
        server.exports(1)
        async with attached(server.address, "disk") as client:
            await client.write(8192, BLOCK)
            await client.flush()
        assert server.stop() == (0, "")
    with serving(tmp_path, zones) as server:
        server.exports(1)
        name = flip(zones[1])
        whole = Path(zones[0], "log", "000001", name).read_bytes()
        found = await asyncio.to_thread(sheepfold, capsys, "scrub", "--follow", "--zone", zones[0])
        assert (found["copies_bad"], found["copies_repaired"], found["running"]) == (1, 1, False)
        assert Path(zones[1], "log", "000001", name).read_bytes() == whole
        for zone in zones:
            flip(zone)
        assert await asyncio.to_thread(main, ["scrub", "--follow", "--zone", zones[0]]) == 8
        assert "3 bad copies could not be replaced" in capsys.readouterr().err
        damage = await asyncio.to_thread(sheepfold, capsys, "vdi", "damage", "disk", "--zone", zones[0])
        assert damage["ranges"] == [{"offset_bytes": 8192, "length_bytes": 4096}]
        status = await asyncio.to_thread(sheepfold, capsys, "status", "--zone", zones[0])
        assert status["store"]["health"] == "degraded"
        server.stop()
    flip(zones[2])
    offline = await asyncio.to_thread(sheepfold, capsys, "scrub", "--zone", zones[0])
    assert (offline["copies_bad"], offline["copies_repaired"], offline["running"]) == (2, 2, False)


async def test_a_zone_is_replaced_while_a_client_writes(
    tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fourth = str(tmp_path / "d")
    Path(fourth).mkdir()
    with serving(tmp_path, zones, "--vdi", "disk:16M") as server:
        server.exports(1)
        async with attached(server.address, "disk") as client:
            for block in range(0, 256, 2):
                await client.write(block * 4096, BLOCK)
            await client.flush()
            replaced = await asyncio.to_thread(sheepfold, capsys, "zone", "replace", "1", fourth, "--zone", zones[0])
            assert [zone["state"] for zone in replaced] == ["in", "draining", "in", "in"]
            for block in range(1, 256, 2):
                await client.write(block * 4096, BLOCK)
            await client.flush()
            done = await asyncio.to_thread(sheepfold, capsys, "recovery", "--follow", "--zone", zones[0])
            assert (done["copies_missing"], done["problems"]) == (0, [])
            assert done["copies_made"] > 0
            slowed = await asyncio.to_thread(sheepfold, capsys, "recovery", "--rate", "5M", "--zone", zones[0])
            assert slowed["bytes_per_second_max"] == 5 * MIB
            fewer = await asyncio.to_thread(sheepfold, capsys, "vdi", "set-copies", "disk", "2", "--zone", zones[0])
            assert fewer["copies"] == 2
            shown = await asyncio.to_thread(sheepfold, capsys, "zone", "list", "--zone", zones[2])
            assert {zone["path"] for zone in shown} >= {zones[0], zones[2], fourth}
        assert server.stop() == (0, "")
    with serving(tmp_path, [zones[0], zones[2], fourth]) as server:
        server.exports(1)
        async with attached(server.address, "disk") as client:
            assert await client.read(0, 1 << 20) == BLOCK * 256


@pytest.mark.parametrize("place", ["missing", "empty", "foreign"])
def test_a_place_without_a_store_is_named_and_left_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    directory = tmp_path / place
    if place != "missing":
        directory.mkdir()
    if place == "foreign":
        (directory / "file").write_text("")
    code, line = fails(capsys, "vdi", "list", "--zone", str(directory))
    assert code == {"missing": 7, "empty": 3, "foreign": 2}[place]
    assert str(directory) in line
    assert directory.exists() == (place != "missing")
    assert place == "missing" or len(list(directory.iterdir())) == (place == "foreign")


def test_zones_that_somebody_holds_without_answering_are_busy(
    zones: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli_admin, "WAIT_SECONDS", 0.0)
    with serving(tmp_path, zones, "--vdi", "disk:1M") as server:
        server.exports(1)
        assert server.stop() == (0, "")
    paths = [Path(zone) for zone in zones]
    with (
        cli_admin.OfflineAdmin(paths, StoreSettings()),
        pytest.raises(Busy, match=f"process {os.getpid()}"),
        cli_admin.open_admin(paths[:1], StoreSettings()),
    ):
        raise AssertionError("two owners")


def test_default_listeners_and_control_socket(tmp_path: Path, runtime: Path) -> None:
    where = places(ServePlan(zones=[tmp_path / "a"]))
    directory = runtime / "sheepfold"
    shown = [str(listener) for listener in where.listeners]
    assert shown == [f"unix://{directory}/sheepfold.sock", "tcp://127.0.0.1:10809"]
    assert where.control.parent == directory


def test_nothing_is_made_where_every_place_is_given(tmp_path: Path, runtime: Path) -> None:
    control = tmp_path / "control.sock"
    plan = ServePlan(zones=[tmp_path / "a"], listen=["tcp://[::1]:10810"], control=control)
    assert places(plan) == Places([Listener(host="::1", port=10810)], control, [])
    assert list(runtime.iterdir()) == []


@pytest.mark.parametrize(
    "text", ["", "disk", "unix://relative", "unix:///a?b", "unix:///a#b", "tcp://", "tcp://h:x", "vsock://x:1"]
)
def test_listeners_that_mean_nothing_are_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        places(ServePlan(zones=[tmp_path], listen=[text], control=tmp_path / "c"))
    assert f"listener {text}" in str(caught.value)


@pytest.mark.parametrize(
    ("listen", "warned"),
    [
        ("unix:///run/x.sock", False),
        ("tcp://127.0.0.1:1", False),
        ("tcp://127.9.9.9:1", False),
        ("tcp://[::1]:1", False),
        ("tcp://localhost:1", False),
        ("tcp://0.0.0.0:1", True),
        ("tcp://[::]:1", True),
        ("tcp://192.0.2.1:1", True),
        ("tcp://storage.example:1", True),
        ("vsock://any:1", True),
        ("vsock://1:1", False),
    ],
)
def test_a_listener_for_other_hosts_is_warned_about(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    expected_warnings: ExpectedWarnings,
    listen: str,
    warned: bool,
) -> None:
    expected_warnings.allow("no TLS")
    assert exposed(Listener.parse(listen)) == warned
    places(ServePlan(zones=[tmp_path], listen=[listen], control=tmp_path / "c"))
    assert ("no TLS" in caplog.text and listen in caplog.text) == warned


@pytest.mark.parametrize(
    ("tls", "said"),
    [
        (TlsSettings("forced", Path("tls")), ""),
        (TlsSettings("forced", Path("tls"), verify_clients=False), "show no certificate"),
        (TlsSettings("selective", Path("tls")), "takes clients without TLS"),
    ],
)
def test_what_tls_leaves_open_is_warned_about(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    expected_warnings: ExpectedWarnings,
    tls: TlsSettings,
    said: str,
) -> None:
    expected_warnings.allow("can be reached")
    places(ServePlan(zones=[tmp_path], listen=["tcp://0.0.0.0:1"], control=tmp_path / "c", tls=tls))
    assert said in caplog.text
    assert bool(said) == bool(caplog.messages)


async def test_tls_on_the_command_line(tmp_path: Path, zones: list[str]) -> None:
    """The certificates of `tls make`, a URI that clients understand, and nothing without TLS."""
    directory = certificates().directory
    options = ("--tls", "forced", "--tls-certificates", str(directory))
    with serving(tmp_path, zones, "--vdi", "disk:64M", *options) as server:
        (export,) = server.exports(1)
        assert export["uris"] == [f"nbds+unix:///disk?socket={tmp_path}/nbd.sock"]
        async with connected(server.address) as plain:
            assert await plain.final(Option.LIST) == Rep.ERR_TLS_REQD
        async with attached(server.address, "disk", tls=certificates().client()) as client:
            await client.write(0, BLOCK)
            assert await client.read(0, len(BLOCK)) == BLOCK
        assert server.stop()[0] == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--tls", "forced"], "TLS: mode = forced needs certificates"),
        (["--tls", "forced", "--tls-certificates", "/nowhere"], "/nowhere/server-cert.pem: No such file"),
        (["--tls-psk", "/keys"], "TLS: psk = /keys"),
        (["--tls", "on"], "--tls"),
    ],
)
def test_tls_mistakes_are_named_in_one_line(
    zones: list[str], capsys: pytest.CaptureFixture[str], options: list[str], named: str
) -> None:
    try:
        code = main(["serve", "--zone", zones[0], *options])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1


def test_what_a_store_is_with_and_without_a_server(
    tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same answer; without a server no byte of the zones changes for it."""
    with serving(tmp_path, zones, "--vdi", "disk:64M") as server:
        server.exports(1)
        online = sheepfold(capsys, "store", "info", "--zone", zones[1])
        assert server.stop() == (0, "")
    files = {path: path.stat().st_mtime_ns for zone in zones for path in Path(zone).rglob("*") if path.is_file()}
    offline = sheepfold(capsys, "store", "info", "--zone", zones[1])
    after = {path: path.stat().st_mtime_ns for zone in zones for path in Path(zone).rglob("*") if path.is_file()}
    assert {path: time for path, time in after.items() if path.name != "lock"} == {
        path: time for path, time in files.items() if path.name != "lock"
    }
    for field in ("store_id", "created", "format_version", "features_read", "epoch", "epochs"):
        assert online[field] == offline[field]
    assert [epoch["reason"] for epoch in offline["epochs"]] == ["start"]
    assert [zone["path"] for zone in offline["zones"]] == zones
    assert main(["store", "info", "--zone", zones[0]]) == 0
    text = capsys.readouterr().out
    assert "zone numbers: 3 of 64 used" in text
    assert zones[2] in text


async def test_clients_are_listed_fenced_and_let_in_from_the_command_line(
    tmp_path: Path, zones: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    me = f"uid:{os.getuid()}"
    with serving(tmp_path, zones[:1], "--vdi", "disk:1M") as server:
        server.exports(1)
        async with attached(server.address, "disk") as client:
            zone = ("--zone", zones[0])
            found = await asyncio.to_thread(sheepfold, capsys, "client", "list", *zone)
            assert [(one["client"], one["export"]) for one in found["connections"]] == [(me, "disk")]
            live = await asyncio.to_thread(sheepfold, capsys, "top", "--once", "--interval", "0.2", *zone)
            assert [(one["name"], one["connections"]) for one in live["vdis"]] == [("disk", 1)]
            kicked = await asyncio.to_thread(sheepfold, capsys, "client", "kick", me, "--fence", *zone)
            assert kicked == {"client": me, "closed": 1, "settled": True}
            await client.expect_close()
        found = await asyncio.to_thread(sheepfold, capsys, "client", "list", *zone)
        assert found["fenced"] == [{"client": me, "seconds_left": None}]
        assert await asyncio.to_thread(sheepfold, capsys, "client", "unfence", me, *zone) == {"unfenced": me}
        async with attached(server.address, "disk") as client:
            assert await client.read(0, 512) == bytes(512)
        assert server.stop()[0] == 0
    code, line = fails(capsys, "client", "list", *zone)
    assert code == 7
    assert "no server" in line


async def test_metrics_are_served_where_they_are_asked_for(tmp_path: Path, zones: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with serving(tmp_path, zones[:1], "--vdi", "disk:1M", "--metrics", f"tcp://127.0.0.1:{port}") as server:
        server.exports(1)
        async with attached(server.address, "disk") as client:
            await client.write(0, BLOCK)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            page = (await reader.read()).decode()
            writer.close()
            await writer.wait_closed()
        assert 'sheepfold_request_seconds_count{command="write",vdi="disk"} 1.0' in page
        code, complaints = server.stop()
        assert (code, complaints) == (0, "")


def test_a_metrics_address_that_can_not_be_had_ends_the_start(tmp_path: Path, zones: list[str]) -> None:
    with serving(tmp_path, zones[:1], "--metrics", "unix:///somewhere") as server:
        assert server.process.wait(timeout=60) == 2
        assert server.process.stderr is not None
        assert "metrics address" in server.process.stderr.read()
