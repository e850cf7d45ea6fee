"""Arguments of the commands that work on what VDIs hold (cli_library.py)."""

import argparse
from collections.abc import Callable

from objstore.volume.settings import LIMIT_KINDS as KINDS

Add = Callable[[argparse.ArgumentParser], None]


def add_transfers(
    add: Callable[[str, str], argparse.ArgumentParser],
    common: Add,
    force: Add,
    name: Callable[[str], str],
    any_name: Callable[[str], str],
    size: Callable[[str], int],
) -> None:
    """`vdi download|upload|allocate|map|flatten`."""
    download = add("download", "write what a VDI or a snapshot holds to stdout or a file, holes kept")
    upload = add("upload", "write stdin or a file to a VDI, holes kept")
    allocate = add("allocate", "reserve space for the holes of a disk, so that they are no holes any more")
    allocate.add_argument("--detach", action="store_true", help="don't wait for the end where a server goes on with it")
    listing = add("map", "show what is data, holes and reserved zeros")
    for parser, kind, metavar in (
        (download, any_name, "NAME[@TAG]"),
        (upload, name, "NAME"),
        (allocate, name, "NAME"),
        (listing, any_name, "NAME[@TAG]"),
    ):
        parser.add_argument("name", metavar=metavar, type=kind)
        if parser in (download, upload):
            parser.add_argument("file", metavar="FILE", nargs="?", default="-", help="-: the standard stream")
        parser.add_argument("--offset", metavar="SIZE", type=size, default=0, help="where to begin (default: 0)")
        parser.add_argument("--length", metavar="SIZE", type=size, default=0, help="how much (default: to the end)")
        common(parser)
        force(parser)
    flatten = add("flatten", "give a clone data of its own, so that it needs the snapshot that it is of no more")
    flatten.add_argument("name", metavar="NAME", type=name)
    flatten.add_argument("--detach", action="store_true", help="don't wait for the end where a server goes on with it")
    common(flatten)
    force(flatten)
    upload.add_argument("--zero-rest", action="store_true", help="zeros for what a short stream leaves of the range")


def add_limit(
    parser: argparse.ArgumentParser,
    common: Add,
    force: Add,
    name: Callable[[str], str],
    operations: Callable[[str], tuple[int, int]],
    size: Callable[[str], tuple[int, int]],
) -> None:
    """`vdi limit`."""
    parser.add_argument("name", metavar="NAME", type=name)
    for kind in KINDS:
        what, _, direction = kind.partition("-")
        of = f" of {direction}s" if direction else ""
        parser.add_argument(
            f"--{kind}",
            metavar="RATE[:BURST]",
            type=operations if what == "iops" else size,
            help=f"{'operations' if what == 'iops' else 'bytes (or K, M, G, T)'}{of} a second; 0 = no limit",
        )
    parser.add_argument(
        "--weight", metavar="N", type=int, help="its part of the server's time when it is short (default: 100)"
    )
    common(parser)
    force(parser)


def add_jobs(commands: argparse.ArgumentParser, common: Add) -> None:
    """`job list|follow|abort`."""
    kinds = commands.add_subparsers(dest="job_command", metavar="COMMAND", required=True)
    common(kinds.add_parser("list", help="list the jobs that run, and those of the last day"))
    for command, what in (("follow", "wait for the end of a job"), ("abort", "make a job end")):
        parser = kinds.add_parser(command, help=what)
        parser.add_argument("job_id", metavar="JOB", type=int)
        common(parser)


def add_group(
    parser: argparse.ArgumentParser, common: Add, force: Add, name: Callable[[str], str], tag: Callable[[str], str]
) -> None:
    """`vdi snapshot-group`."""
    parser.add_argument("tag", metavar="TAG", type=tag, help="name of the snapshot of each of them")
    parser.add_argument("names", metavar="NAME", nargs="+", type=name)
    parser.add_argument("--protect", action="store_true", help="let nobody delete them until they are unprotected")
    common(parser)
    force(parser)


def add_exclusive(parser: argparse.ArgumentParser, common: Add, force: Add, name: Callable[[str], str]) -> None:
    """`vdi exclusive`."""
    parser.add_argument("name", metavar="NAME@TAG", type=name)
    common(parser)
    force(parser)


def add_trash(
    add: Callable[[str, str], argparse.ArgumentParser], common: Add, force: Add, name: Callable[[str], str]
) -> None:
    """`vdi undelete|purge`."""
    undelete = add("undelete", "bring a deleted VDI back from the trash")
    purge = add("purge", "delete a VDI in the trash for good")
    for parser in (undelete, purge):
        parser.add_argument("name", metavar="NAME", type=name)
        if parser is undelete:
            parser.add_argument("new", metavar="NEW", nargs="?", type=name, help="another name (default: as before)")
        parser.add_argument(
            "--id", metavar="N", dest="vdi_id", type=int, help="which of several of that name (default: deleted last)"
        )
        common(parser)
        force(parser)


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
