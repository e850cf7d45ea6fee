"""The command line as argparse sees it: commands, options, and what their texts may be.

Imports nothing heavy: help, completion and usage errors must not wait for numpy, aiohttp or an event loop.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from nbdserver.attach.command import add_attach, add_detach
from nbdserver.cli_diff_arguments import add_diffs
from nbdserver.cli_library_arguments import (
    add_attr,
    add_exclusive,
    add_group,
    add_jobs,
    add_limit,
    add_transfers,
    add_trash,
)
from nbdserver.cli_server_arguments import add_client, add_top
from objstore.errors import InvalidRequest
from objstore.names import check_name, check_path, check_tag
from objstore.units import check_vdi_bytes, parse_size
from objstore.version import VERSION
from objstore.volume.settings import MODES

EXIT_USAGE: Final = 2
"""Exit code of a request that is wrong in itself, as every program's that uses argparse."""

CONFIG_VARIABLE: Final = "SHEEPFOLD_CONFIG"
TLS_MODES: Final = ("off", "selective", "forced")
SHELLS: Final = ("bash", "zsh", "tcsh")

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """A parser that complains in one line and never guesses what an abbreviation means."""

    def __init__(self, **properties: Any) -> None:
        super().__init__(**properties, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(
            EXIT_USAGE,
            f"sheepfold: error: {' '.join(message.splitlines())} (see {self.prog} --help)\n",
        )


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(prog="sheepfold", description="Virtual disks over NBD, replicated over directories.")
    parser.add_argument("--version", action="version", version=f"sheepfold {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_serve(commands.add_parser("serve", help="serve a store's VDIs until SIGTERM or SIGINT"))
    vdi = commands.add_parser("vdi", help="create, list, show and delete VDIs")
    _add_vdi_commands(vdi.add_subparsers(dest="vdi_command", metavar="COMMAND", required=True))
    scrub = commands.add_parser("scrub", help="read and check every copy of everything now, and replace bad ones")
    scrub.add_argument("--follow", action="store_true", help="wait for the end, with a progress bar on a terminal")
    _add_common(scrub)
    recovery = commands.add_parser("recovery", help="show which copies are missing and how far their recovery is")
    recovery.add_argument("--follow", action="store_true", help="wait for the end, with a progress bar on a terminal")
    recovery.add_argument(
        "--rate",
        metavar="SIZE",
        type=_argument(_rate),
        help="from now on at most so many bytes a second; 0 = no limit",
    )
    _add_common(recovery)
    add_jobs(commands.add_parser("job", help="list, follow and abort long work"), _add_common)
    add_client(
        commands.add_parser("client", help="list the clients of a running server, and end their connections"),
        _add_common,
    )
    _add_common(commands.add_parser("reload", help="have the running server read its configuration again"))
    add_top(commands.add_parser("top", help="show what VDIs, clients and zones of a running server do"), _add_common)
    _add_common(commands.add_parser("trash", help="list the deleted VDIs that can still be brought back"))
    zone = commands.add_parser("zone", help="list, add, drain, remove and replace zones")
    _add_zone_commands(zone.add_subparsers(dest="zone_command", metavar="COMMAND", required=True))
    status = commands.add_parser("status", help="show the health of a store and its zones")
    _add_common(status)
    _add_force(status)
    store = commands.add_parser("store", help="show what a store is, and bring it to the newest format")
    store_commands = store.add_subparsers(dest="store_command", metavar="COMMAND", required=True)
    info = store_commands.add_parser(
        "info", help="show when a store was made, its format, its epochs and what lies in its zones"
    )
    _add_common(info)
    _add_force(info)
    _add_common(store_commands.add_parser("upgrade", help="bring a store to the newest format (so far there is one)"))
    add_attach(commands.add_parser("attach", help="make an export /dev/nbdN of this machine, and keep it attached"))
    add_detach(commands.add_parser("detach", help="flush and detach /dev/nbdN"))
    check = commands.add_parser("check", help="check a store that no server has open, without changing it")
    _add_common(check)
    check.add_argument(
        "--repair", action="store_true", help="mend what can be mended without a choice, then check again"
    )
    check.add_argument("--verbose", "-v", action="store_true", help="list ordinary leftovers too")
    tls = commands.add_parser("tls", help="make certificates for encrypted connections")
    _add_tls_make(
        tls.add_subparsers(dest="tls_command", metavar="COMMAND", required=True).add_parser(
            "make", help="write a CA, a server's certificate and one for each client, to try TLS out"
        )
    )
    completion = commands.add_parser("completion", help="print a completion script for a shell")
    completion.add_argument("shell", choices=SHELLS)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    """How every command finds its store and prints its answer."""
    parser.add_argument(
        "--zone",
        metavar="DIR",
        dest="zones",
        type=_argument(_path),
        action="append",
        default=[],
        help="directory of a zone; one zone of a store stands for all (repeatable)",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=_argument(_path),
        help=f"configuration file (TOML); otherwise ${CONFIG_VARIABLE}",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _add_force(parser: argparse.ArgumentParser) -> None:
    """For commands that may have to open the zones themselves."""
    parser.add_argument(
        "--force",
        dest="force_open",
        action="store_true",
        help="open the store although missing zones may hold newer data; what only they hold, flushed data included, "
        "is then given up for good",
    )


def _add_serve(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    _add_force(parser)
    parser.add_argument(
        "--vdi",
        metavar="NAME:SIZE",
        dest="vdis",
        type=_argument(_name_and_size),
        action="append",
        default=[],
        help="create this VDI if it is missing; SIZE takes K, M, G, T (repeatable)",
    )
    _add_vdi_properties(parser)
    parser.add_argument(
        "--listen",
        metavar="URL",
        action="append",
        default=[],
        help="unix:///PATH, tcp://HOST:PORT or vsock://CID:PORT instead of the default listeners (repeatable)",
    )
    parser.add_argument(
        "--tls",
        choices=TLS_MODES,
        help="off: none (default); selective: for clients that ask for it and exports that require it; forced: for all",
    )
    parser.add_argument(
        "--tls-certificates",
        metavar="DIR",
        type=_argument(_path),
        help="directory with ca-cert.pem, server-cert.pem and server-key.pem",
    )
    parser.add_argument(
        "--tls-any-client",
        action="store_true",
        help="serve clients that show no certificate too: encrypted, but open to everyone",
    )
    parser.add_argument(
        "--tls-psk",
        metavar="FILE",
        type=_argument(_path),
        help="file of pre-shared keys; refused so far, with the reason",
    )
    parser.add_argument("--default", metavar="NAME", help="VDI that clients get who name none")
    parser.add_argument(
        "--list-snapshots", action="store_true", help="show clients who ask for a list of exports the snapshots too"
    )
    parser.add_argument(
        "--control", metavar="PATH", type=_argument(_path), help="control socket instead of the default one"
    )
    parser.add_argument(
        "--swap", action="store_true", help="keep all memory, for clients that swap to a disk of this server"
    )
    parser.add_argument("--metrics", metavar="URL", help="tcp://HOST:PORT where Prometheus may ask (default: nowhere)")
    parser.add_argument(
        "--log-format",
        choices=("auto", "text", "json", "journal"),
        help="how log records look (default: journal fields if stderr is connected to the journal, else text)",
    )
    parser.add_argument("--verbose", "-v", action="store_true", help="log connections and store events to stderr")


def _add_tls_make(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", type=_argument(_directory))
    parser.add_argument(
        "--host",
        metavar="HOST",
        dest="hosts",
        action="append",
        default=[],
        help="name or address of the server besides localhost (repeatable)",
    )
    parser.add_argument(
        "--client",
        metavar="NAME",
        dest="clients",
        action="append",
        default=[],
        help="name of a client, whose directory is DIR/NAME (repeatable; default: client)",
    )
    parser.add_argument("--days", metavar="N", type=int, default=365, help="how long they are valid (default: 365)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _add_vdi_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    create = commands.add_parser("create", help="create a VDI")
    create.add_argument("name", metavar="NAME", type=_argument(_name))
    create.add_argument("size_bytes", metavar="SIZE", type=_argument(_vdi_size), help="bytes, or with K, M, G, T")
    _add_vdi_properties(create)
    create.add_argument(
        "--prealloc", action="store_true", help="reserve the whole size, so that no write meets a full disk"
    )
    _add_common(create)
    _add_force(create)
    listing = commands.add_parser("list", help="list the VDIs")
    _add_common(listing)
    _add_force(listing)
    copies = commands.add_parser("set-copies", help="change how many zones hold each object of a VDI")
    copies.add_argument("name", metavar="NAME", type=_argument(_name))
    copies.add_argument("copies", metavar="N", type=_argument(_copies))
    _add_common(copies)
    _add_snapshot_commands(commands)
    add_attr(
        commands.add_parser("attr", help="small values that a VDI carries"), _add_common, _add_force, _argument(_name)
    )
    add_limit(
        commands.add_parser("limit", help="show or set how much the clients of a VDI may do in a second"),
        _add_common,
        _add_force,
        _argument(_name),
        _argument(_operations),
        _argument(_bytes),
    )
    add_group(
        commands.add_parser("snapshot-group", help="take a snapshot of several VDIs at one instant"),
        _add_common,
        _add_force,
        _argument(_name),
        _argument(_tag),
    )
    add_exclusive(
        commands.add_parser("exclusive", help="show how much of a snapshot's data nothing else needs"),
        _add_common,
        _add_force,
        _argument(_snapshot_name),
    )
    add_trash(lambda command, what: commands.add_parser(command, help=what), _add_common, _add_force, _argument(_name))
    add_transfers(
        lambda command, what: commands.add_parser(command, help=what),
        _add_common,
        _add_force,
        _argument(_name),
        _argument(_any_name),
        _argument(_rate),
    )
    add_diffs(lambda command, what: commands.add_parser(command, help=what), _add_common, _add_force, _argument)
    for command, what, metavar, convert in (
        ("info", "show one VDI", "NAME", _name),
        ("delete", "delete a VDI, or a snapshot, and its data for good", "NAME[@TAG]", _any_name),
        ("damage", "list the parts of a VDI that no zone has whole", "NAME", _name),
    ):
        parser = commands.add_parser(command, help=what)
        parser.add_argument("name", metavar=metavar, type=_argument(convert))
        _add_common(parser)
        _add_force(parser)


def _add_snapshot_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    snapshot = commands.add_parser("snapshot", help="take a snapshot of a VDI, attached or not")
    snapshot.add_argument("name", metavar="NAME", type=_argument(_name))
    snapshot.add_argument(
        "tag", metavar="TAG", nargs="?", default="", type=_argument(_tag), help="its name (default: only a number)"
    )
    snapshot.add_argument("--skip-unchanged", action="store_true", help="not if nothing was written since the last one")
    snapshot.add_argument("--protect", action="store_true", help="let nobody delete it until it is unprotected")
    _add_common(snapshot)
    _add_force(snapshot)
    listing = commands.add_parser("snapshots", help="list the snapshots of a VDI, or of all")
    listing.add_argument("name", metavar="NAME", nargs="?", type=_argument(_name))
    _add_common(listing)
    _add_force(listing)
    clone = commands.add_parser("clone", help="create a VDI that begins as a snapshot, or as another VDI is now")
    clone.add_argument("source", metavar="NAME[@TAG]", type=_argument(_any_name))
    clone.add_argument("name", metavar="NEW", type=_argument(_name))
    clone.add_argument("--copies", metavar="N", type=_argument(_copies), help="(default: as there)")
    clone.add_argument("--mode", choices=MODES, help="(default: as there)")
    _add_common(clone)
    _add_force(clone)
    rename = commands.add_parser("rename", help="give a VDI, attached or not, another name")
    rename.add_argument("name", metavar="NAME", type=_argument(_name))
    rename.add_argument("new", metavar="NEW", type=_argument(_name))
    _add_common(rename)
    _add_force(rename)
    resize = commands.add_parser("resize", help="make a VDI, attached or not, larger, or by force smaller")
    resize.add_argument("name", metavar="NAME", type=_argument(_name))
    resize.add_argument("size_bytes", metavar="SIZE", type=_argument(_vdi_size), help="bytes, or with K, M, G, T")
    resize.add_argument(
        "--reconnect", action="store_true", help="close its clients' connections then, so that they see the new size"
    )
    resize.add_argument(
        "--force",
        action="store_true",
        help="also smaller, losing what is behind the new end: close its clients' connections first, and let nobody in"
        " until `vdi resume`",
    )
    _add_common(resize)
    rollback = commands.add_parser("rollback", help="make a VDI what it was at a snapshot")
    rollback.add_argument("name", metavar="NAME@TAG", type=_argument(_snapshot_name))
    rollback.add_argument(
        "--force",
        action="store_true",
        help="even if it is attached: close its clients' connections first, and let nobody in until `vdi resume`",
    )
    _add_common(rollback)
    resume = commands.add_parser("resume", help="let clients in again after a change that was forced")
    resume.add_argument("name", metavar="NAME", type=_argument(_name))
    _add_common(resume)
    _add_force(resume)
    tree = commands.add_parser("tree", help="show which VDI or snapshot comes from which")
    tree.add_argument("--dot", action="store_true", help="print a graph in the DOT language (Graphviz)")
    _add_common(tree)
    _add_force(tree)
    for command, what in (
        ("protect", "let nobody delete a snapshot"),
        ("unprotect", "let a snapshot be deleted again"),
    ):
        parser = commands.add_parser(command, help=what)
        parser.add_argument("name", metavar="NAME@TAG", type=_argument(_snapshot_name))
        _add_common(parser)
        _add_force(parser)


def _add_zone_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    _add_common(commands.add_parser("list", help="list the zones"))
    add = commands.add_parser("add", help="make an empty directory a zone, or take a zone back that was out")
    add.add_argument("which", metavar="DIR", type=_argument(_directory))
    add.add_argument("--weight", metavar="W", type=float, help="its share of the data (default: its size in GiB)")
    _add_common(add)
    drain = commands.add_parser("drain", help="move everything off a zone")
    drain.add_argument("which", metavar="ZONE", help="path, number or beginning of its id")
    _add_common(drain)
    remove = commands.add_parser("remove", help="forget a zone that is drained or lost")
    remove.add_argument("which", metavar="ZONE", help="path, number or beginning of its id")
    remove.add_argument("--force", action="store_true", help="even if it may have what no other zone has")
    _add_common(remove)
    replace = commands.add_parser("replace", help="put a new zone in the place of a lost or old one")
    replace.add_argument("which", metavar="ZONE", help="path, number or beginning of the old one's id")
    replace.add_argument("path", metavar="DIR", type=_argument(_directory))
    _add_common(replace)
    weight = commands.add_parser("set-weight", help="change a zone's share of the data")
    weight.add_argument("which", metavar="ZONE", help="path, number or beginning of its id")
    weight.add_argument("weight", metavar="W", type=float)
    _add_common(weight)


def _add_vdi_properties(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--copies",
        metavar="N",
        type=_argument(_copies),
        help="zones that hold each object of a new VDI (default: 3, or the number of zones if that is less)",
    )
    parser.add_argument(
        "--mode",
        choices=MODES,
        default=MODES[0],
        help=f"when writes to a new VDI are acknowledged (default: {MODES[0]})",
    )


def _argument(convert: Callable[[str], T]) -> Callable[[str], T]:
    """`convert` as argparse wants it: its InvalidRequest becomes a usage error that names the option."""

    def converted(text: str) -> T:
        try:
            return convert(text)
        except InvalidRequest as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return converted


def _path(text: str) -> Path:
    check_path(text, "path")
    return Path(text)


def _directory(text: str) -> str:
    """Absolute: a server has another working directory."""
    check_path(text, "path")
    return os.path.abspath(text)


def _rate(text: str) -> int:
    return 0 if text == "0" else parse_size(text)


def _bytes(text: str) -> tuple[int, int]:
    rate, colon, burst = text.partition(":")
    return _rate(rate), _rate(burst) if colon else 0


def _operations(text: str) -> tuple[int, int]:
    rate, colon, burst = text.partition(":")
    for number in (rate, burst) if colon else (rate,):
        if not (number.isascii() and number.isdigit() and len(number) <= 9):
            raise InvalidRequest(f"{text!r} is not RATE or RATE:BURST in operations (e.g. 500:2000)")
    return int(rate), int(burst) if colon else 0


def _name(text: str) -> str:
    check_name(text)
    return text


def _tag(text: str) -> str:
    check_tag(text)
    return text


def _snapshot_name(text: str) -> str:
    name, at, which = text.partition("@")
    if not at or not which:
        raise InvalidRequest(f"{text!r} is not NAME@TAG or NAME@INDEX")
    check_name(name)
    if not which.isdigit():
        check_tag(which)
    return text


def _any_name(text: str) -> str:
    return _snapshot_name(text) if "@" in text else _name(text)


def _vdi_size(text: str) -> int:
    size_bytes = parse_size(text)
    check_vdi_bytes(size_bytes)
    return size_bytes


def _name_and_size(text: str) -> tuple[str, int]:
    name, colon, size = text.partition(":")
    if not colon:
        raise InvalidRequest(f"{text!r} is not NAME:SIZE (e.g. disk:10G)")
    return _name(name), _vdi_size(size)


def _copies(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) > 0):
        raise InvalidRequest(f"{text!r} is not a number of copies (1 or more)")
    return int(text)
