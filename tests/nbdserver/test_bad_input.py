"""What people get wrong, through the real command: one line that names the offender, and the documented exit code.

The commands run in this process; none of them may come so far as to serve. tests/nbdserver/test_cli.py has what needs
no store, test_config.py the keys, test_control.py the control socket's own errors.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdserver.cli import main
from objstore.backend.directory import DirectoryBackend
from objstore.errors import InvalidRequest
from objstore.names import check_path, object_number

COMMAND = (sys.executable, "-m", "nbdserver")
ZONES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def box(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of one's own to be in, with something wrong of each kind; its name leaves room for sockets."""
    with tempfile.TemporaryDirectory(prefix="bad-") as name, monkeypatch.context() as patch:
        yield furnished(Path(name), patch)


def furnished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SHEEPFOLD_CONFIG", raising=False)
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "afile").write_text("x")
    return tmp_path


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit code and error line of a command that must fail."""
    try:
        code: object = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.split("\n") if not line.startswith("sheepfold: WARNING: ")]
    assert captured.out == ""
    assert lines[0].startswith("sheepfold: error: ")
    assert lines[1:] == [""]
    assert lines[0].isprintable()
    assert isinstance(code, int)
    return code, lines[0]


SERVE = [
    ("--zone foreign", 2, "foreign is neither empty nor a zone"),
    ("--zone afile", 2, "afile can't be made a zone"),
    ("--zone afile/sub", 2, "afile/sub can't be made a zone"),
    ("--zone /proc/nope", 2, "/proc/nope can't be made a zone"),
    ("--zone=", 2, "--zone: path: the path is empty"),
    ("--zone a\0b", 2, "'a\\x00b'"),
    ("--zone a\udcffb", 2, "'a\\udcffb'"),
    ("--zone a --zone a", 2, "/a is given twice"),
    ("--zone a --zone b/../a", 2, "/a is given twice"),
    ("--zone a --vdi disk", 2, "'disk' is not NAME:SIZE"),
    ("--zone a --vdi disk:", 2, "size ''"),
    ("--zone a --vdi :1G", 2, "must not be empty"),
    ("--zone a --vdi disk:0", 2, "0 bytes"),
    ("--zone a --vdi disk:-1", 2, "'-1'"),
    ("--zone a --vdi disk:1e9", 2, "'1e9'"),
    ("--zone a --vdi disk:99999T", 2, "109950063265972224"),
    ("--zone a --vdi disk:999999999999999999999999", 2, "'999999999999999999999999'"),
    ("--zone a --vdi disk:0.3", 2, "'0.3'"),
    ("--zone a --vdi a/b:1G", 2, "'a/b'"),
    ("--zone a --vdi .a:1G", 2, "'.a'"),
    ("--zone a --vdi a\tb:1G", 2, "'a\\tb'"),
    ("--zone a --vdi a:1G --vdi a:2G", 2, "VDI a is given twice"),
    ("--zone a --vdi disk:1G --copies 2", 2, "copies = 2"),
    ("--zone a --vdi disk:1G --mode fast", 2, "'fast'"),
    ("--zone a --listen foo", 2, "listener foo"),
    ("--zone a --listen tcp://127.0.0.1:99999", 2, "listener tcp://127.0.0.1:99999"),
    ("--zone a --listen tcp://127.0.0.1:x", 2, "listener tcp://127.0.0.1:x"),
    ("--zone a --listen tcp://[::1", 2, "listener tcp://[::1"),
    ("--zone a --listen tcp://127.0.0.1:1/x", 2, "listener tcp://127.0.0.1:1/x"),
    ("--zone a --listen tcp://no.such.host.invalid:1", 1, "can't listen on tcp://no.such.host.invalid:1"),
    ("--zone a --listen unix://rel/path", 2, "listener unix://rel/path"),
    ("--zone a --listen unix:///tmp/a%00b", 2, "NUL"),
    ("--zone a --listen unix:///tmp/a?b", 2, "%3F"),
    ("--zone a --listen unix:///nope/dir/x.sock", 1, "can't listen on unix:///nope/dir/x.sock"),
    (f"--zone a --listen unix:///{'x' * 120}", 1, "path too long"),
    ("--zone a --default nope --listen tcp://127.0.0.1:0", 2, "'nope' does not exist"),
    ("--zone a --control afile --listen tcp://127.0.0.1:0", 2, "control socket afile"),
    ("--zone a --control /nope/x --listen tcp://127.0.0.1:0", 2, "control socket /nope/x"),
    ("--zone a --control= --listen tcp://127.0.0.1:0", 2, "--control: path: the path is empty"),
    ("--zone a --control a\0b --listen tcp://127.0.0.1:0", 2, "'a\\x00b'"),
    (f"--zone a --control /{'x' * 120} --listen tcp://127.0.0.1:0", 2, "path too long"),
    ("--config nope.toml", 2, "nope.toml: No such file"),
    ("--config empty", 2, "empty: Is a directory"),
    ("--config /dev/zero", 2, "/dev/zero: larger than"),
    ("--config=", 2, "--config: path: the path is empty"),
]


@pytest.mark.parametrize(("arguments", "code", "offender"), SERVE)
def test_serve(capsys: pytest.CaptureFixture[str], arguments: str, code: int, offender: str) -> None:
    found, line = fails(capsys, "serve", *arguments.split(" "))
    assert offender in line
    assert found == code


CONFIGS = [
    ("zones = ", "Invalid value"),
    ('zones = "x"', "zones"),
    ("zones = [1]", "zones[0]"),
    ("zones = []", "which store?"),
    ('zones = [""]', "zones[0]: the path is empty"),
    ('zones = ["c\\u0000z"]', "'c\\x00z'"),
    ('zone = ["a"]', "unknown key zone"),
    ('zones = ["a"]\nlisten = ["foo"]', "listener foo"),
    ('zones = ["a"]\nlisten = ["unix:///tmp/a\\u0000b"]', "NUL"),
    ('zones = ["a"]\ncontrol = "a\\u0000b"', "'a\\x00b'"),
    ('zones = ["a"]\n"bad key\\u0001\\n" = 1', "unknown key bad key\\x01"),
    ('zones = ["a"]\nstore = 5', "[store]"),
    ('zones = ["a"]\n[store]\ndirty_age_seconds = nan', "dirty_age_seconds = nan"),
    ('zones = ["a"]\n[store]\nsegment_bytes = 300001', "segment_bytes = 300001"),
    ('zones = ["a"]\n[vdi]\nd = 5', "[vdi.d]"),
    ('zones = ["a"]\n[vdi.d]', "vdi.d: Object missing required field `size`"),
    ('zones = ["a"]\n[vdi.d]\nsize = true', "vdi.d.size"),
    ('zones = ["a"]\n[vdi."a/b"]\nsize = 5', "'a/b'"),
    ('zones = ["a"]\n[vdi.d]\nsize = "1G"\ncopies = 99999999999999999999', "copies = 99999999999999999999"),
    ('zones = ["a"]\n[vdi.d]\nsize = "1G"\nprealloc = "yes"', "vdi.d.prealloc"),
    ('zones = ["a"]\n[server]\nhandshake_seconds = inf', "handshake_seconds = inf"),
    ('zones = ["a"]\n[server]\noption_bytes_max = 1', "server.option_bytes_max"),
    ('zones = ["a"]\nzones = ["b"]', "Cannot overwrite"),
    ("a = " + "[" * 100_000, "nested too deeply"),
]


@pytest.mark.parametrize(("text", "offender"), CONFIGS)
def test_configuration(capsys: pytest.CaptureFixture[str], box: Path, text: str, offender: str) -> None:
    (box / "c.toml").write_text(text)
    code, line = fails(capsys, "serve", "--config", "c.toml")
    assert offender in line
    assert code == 2


# A store whose zones people have been at


@pytest.fixture
def store(box: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Three zones, one VDI."""
    zones = [argument for zone in ZONES for argument in ("--zone", zone)]
    server = subprocess.Popen(
        [*COMMAND, "serve", *zones, "--vdi", "disk:1G", "--listen", f"unix://{box / 's'}"],
        stdout=subprocess.PIPE,
        cwd=box,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert server.stdout is not None
    assert server.stdout.readline().startswith(b"disk")
    server.terminate()
    assert server.wait(30) == 0
    server.stdout.close()
    return box


def damage_superblock(box: Path) -> None:
    data = bytearray((box / "a" / "superblock").read_bytes())
    data[-20] ^= 1
    (box / "a" / "superblock").write_bytes(data)


def lose_two(box: Path) -> None:
    shutil.rmtree(box / "b")
    shutil.rmtree(box / "c")


def damage_and_lose(box: Path) -> None:
    damage_superblock(box)
    lose_two(box)


STORES: list[tuple[str, Callable[[Path], object], str, int, str]] = [
    ("no such VDI", lambda box: None, "vdi info nope --zone a", 3, "'nope'"),
    ("no such VDI to delete", lambda box: None, "vdi delete nope --zone a", 3, "'nope'"),
    ("name taken", lambda box: None, "vdi create disk 1G --zone b", 4, "'disk'"),
    ("too many copies", lambda box: None, "vdi create x 1G --copies 4 --zone a", 2, "copies = 4"),
    ("no space", lambda box: None, "vdi create x 9000T --prealloc --zone a", 6, "9000T"),
    ("no zone", lambda box: None, "vdi list --zone empty", 3, "empty is no zone"),
    ("no directory", lambda box: None, "status --zone nope", 7, "there is no directory"),
    ("no directories", lambda box: None, "vdi list --zone nope --zone nil", 7, "there is no directory"),
    ("nothing to check", lambda box: None, "check --zone nope", 7, "there is no directory"),
    ("gone", lambda box: shutil.rmtree(box / "a"), "status --zone a", 7, "there is no directory"),
    ("too many gone", lose_two, "serve --zone a", 7, "zones are missing"),
    ("too many gone, all named", lose_two, "serve --zone a --zone b --zone c", 7, "zones are missing"),
    ("gone beside a damaged one", damage_and_lose, "serve --zone a --zone b", 7, "there is no such directory"),
    ("a file", lambda box: None, "scrub --zone afile", 3, "afile is no directory"),
    ("foreign", lambda box: None, "vdi list --zone foreign", 2, "foreign is neither empty nor a zone"),
    ("a copy", lambda box: shutil.copytree(box / "a", box / "d"), "vdi list --zone a --zone d --zone b", 2, "/d"),
    ("nothing to add", lambda box: None, "zone add nowhere --zone a", 3, "nowhere: make an empty one"),
    ("damaged superblock", damage_superblock, "vdi list --zone a", 8, "/a/superblock"),
    ("no superblock", lambda box: (box / "a" / "superblock").unlink(), "vdi list --zone a", 8, "/a/superblock"),
    (
        "empty superblock",
        lambda box: (box / "a" / "superblock").write_bytes(b""),
        "vdi list --zone a",
        8,
        "/a/superblock",
    ),
]


@pytest.mark.parametrize(
    ("change", "arguments", "code", "offender"), [case[1:] for case in STORES], ids=[case[0] for case in STORES]
)
def test_stores(
    capsys: pytest.CaptureFixture[str],
    store: Path,
    change: Callable[[Path], object],
    arguments: str,
    code: int,
    offender: str,
) -> None:
    change(store)
    names = sorted(os.listdir(store))
    found, line = fails(capsys, *arguments.split(" "))
    assert offender in line
    assert found == code
    assert not set(os.listdir(store)) - {*names, "sheepfold"}, "nobody is to find an empty directory in place of a zone"


def test_a_refusal_leaves_no_directory_that_was_made_for_a_new_store(
    box: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted(os.listdir(box))
    fails(capsys, "serve", "--zone", "new/deep", "--zone", "afile/sub")
    assert not set(os.listdir(box)) - {*names, "sheepfold"}, "sheepfold: for the sockets"


def test_files_of_others_in_a_zone_stop_nothing(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In every folder that is listed at opening."""
    for folder in ("", "epoch", "catalog", "log", "log/000001", "checkpoint", "checkpoint/000001"):
        (store / "a" / folder).mkdir(parents=True, exist_ok=True)
        (store / "a" / folder / "zzz").write_text("junk")
    assert main(["vdi", "list", "--zone", "a", "--json"]) == 0
    assert [vdi["name"] for vdi in json.loads(capsys.readouterr().out)] == ["disk"]


def test_somebody_else_holds_the_lock(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backend = DirectoryBackend(str(store / "a"))
    backend.lock("not json")
    try:
        code, line = fails(capsys, "vdi", "list", "--zone", "a")
    finally:
        backend.close()
    assert "/a" in line
    assert code == 2


@pytest.fixture
def current_directory_gone(box: Path) -> Iterator[None]:
    (box / "gone").mkdir()
    os.chdir(box / "gone")
    (box / "gone").rmdir()
    yield
    os.chdir(box)


def test_a_relative_path_from_nowhere(capsys: pytest.CaptureFixture[str], current_directory_gone: None) -> None:
    code, line = fails(capsys, "vdi", "list", "--zone", "rel")
    assert "zone rel" in line
    assert code == 2


def test_a_closed_standard_output() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -m nbdserver completion bash >&-', sys.executable],
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")


REQUESTS = [
    (b"GARBAGE\r\n\r\n", b" 400 "),
    (b"GET /v1/nope HTTP/1.1\r\nHost: x\r\n\r\n", b" 404 "),
    (b"PUT /v1/vdis HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", b" 405 "),
    (b"GET /v1/vdis/%2e%2e HTTP/1.1\r\nHost: x\r\n\r\n", b" 404 "),
    (b"GET /v1/vdis/%ff HTTP/1.1\r\nHost: x\r\n\r\n", b" 404 "),
    (b"POST /v1/vdis HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n{{{", b" 400 "),
    (b'POST /v1/vdis HTTP/1.1\r\nHost: x\r\nContent-Length: 13\r\n\r\n{"name": "a"}', b" 400 "),
    (b"POST /v1/vdis HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b" 400 "),
    (b"POST /v1/vdis HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n" + bytes(70_000), b" 413 "),
]


def test_malformed_requests_to_the_control_socket(store: Path) -> None:
    """Each gets its status and harms nobody; the server says nothing on its own stderr."""
    address = store / "control"
    server = subprocess.Popen(
        [*COMMAND, "serve", "--zone", "a", "--listen", f"unix://{store / 's'}", "--control", str(address)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=store,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert server.stdout is not None
    server.stdout.readline()
    try:
        for request, status in REQUESTS:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(20)
                client.connect(str(address))
                client.sendall(request)
                answer = client.recv(1000)
            assert status in answer.split(b"\r\n")[0], (request[:60], answer)
        assert main(["vdi", "info", "disk", "--zone", "b", "--json"]) == 0
    finally:
        server.terminate()
        _, errors = server.communicate(timeout=30)
    assert server.returncode == 0
    assert errors == b""


def test_paths() -> None:
    check_path("a b/ä\n", "x")
    for path in ("", "a\0", "\udcff"):
        with pytest.raises(InvalidRequest, match="x"):
            check_path(path, "x")


def test_numbers_of_objects() -> None:
    assert object_number("epoch/0000001f") == 31
    for name in ("epoch/zzz", "epoch/+000001f", "epoch/0000001F", "epoch/0x00001f", "epoch/1f", "epoch/0000_01f", "x"):
        assert object_number(name) is None
