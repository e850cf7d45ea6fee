"""Arguments of the commands that work on what VDIs hold (cli_library.py)."""

import argparse
from collections.abc import Callable

Add = Callable[[argparse.ArgumentParser], None]


def add_attr(commands: argparse.ArgumentParser, common: Add, force: Add, name: Callable[[str], str]) -> None:
    """`vdi attr set|get|list|delete`."""
    kinds = commands.add_subparsers(dest="attr_command", metavar="COMMAND", required=True)
    for command, what in (
        ("set", "set an attribute"),
        ("get", "print an attribute's value as it is"),
        ("list", "list the attributes of a VDI"),
        ("delete", "remove an attribute"),
    ):
        parser = kinds.add_parser(command, help=what)
        parser.add_argument("name", metavar="NAME", type=name)
        if command != "list":
            parser.add_argument("key", metavar="KEY")
        if command == "set":
            parser.add_argument("value", metavar="VALUE", nargs="?", help="text (default: what stdin has, any bytes)")
            parser.add_argument("--exclusive", action="store_true", help="only if there is none of that name")
        common(parser)
        force(parser)
