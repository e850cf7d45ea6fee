"""The command line as argparse sees it: commands, options, and what their texts may be.

Imports nothing heavy: help, completion and usage errors must not wait for numpy, aiohttp or an event loop.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from objstore.errors import InvalidRequest
from objstore.names import check_name
from objstore.units import check_vdi_bytes, parse_size
from objstore.version import VERSION
from objstore.volume.settings import MODES

EXIT_USAGE: Final = 2
"""Exit code of a request that is wrong in itself, as every program's that uses argparse."""

CONFIG_VARIABLE: Final = "SHEEPFOLD_CONFIG"
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
    _add_common(commands.add_parser("status", help="show the health of a store and its zones"))
    completion = commands.add_parser("completion", help="print a completion script for a shell")
    completion.add_argument("shell", choices=SHELLS)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    """How every command finds its store and prints its answer."""
    parser.add_argument(
        "--zone",
        metavar="DIR",
        dest="zones",
        type=Path,
        action="append",
        default=[],
        help="directory of a zone; one zone of a store stands for all (repeatable)",
    )
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help=f"configuration file (TOML); otherwise ${CONFIG_VARIABLE}"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _add_serve(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
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
        help="unix:///PATH or tcp://HOST:PORT instead of the default listeners (repeatable)",
    )
    parser.add_argument("--default", metavar="NAME", help="VDI that clients get who name none")
    parser.add_argument("--control", metavar="PATH", type=Path, help="control socket instead of the default one")
    parser.add_argument("--verbose", "-v", action="store_true", help="log connections and store events to stderr")


def _add_vdi_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    create = commands.add_parser("create", help="create a VDI")
    create.add_argument("name", metavar="NAME", type=_argument(_name))
    create.add_argument("size_bytes", metavar="SIZE", type=_argument(_vdi_size), help="bytes, or with K, M, G, T")
    _add_vdi_properties(create)
    create.add_argument(
        "--prealloc", action="store_true", help="reserve the whole size, so that no write meets a full disk"
    )
    _add_common(create)
    _add_common(commands.add_parser("list", help="list the VDIs"))
    for command, what in (("info", "show one VDI"), ("delete", "delete a VDI and its data for good")):
        parser = commands.add_parser(command, help=what)
        parser.add_argument("name", metavar="NAME", type=_argument(_name))
        _add_common(parser)


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


def _name(text: str) -> str:
    check_name(text)
    return text


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
