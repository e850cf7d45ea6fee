"""`vdi diff`, `vdi export-diff`, `vdi import-diff`: what has changed between snapshots, and how it gets elsewhere."""

import argparse
import itertools
import sys
from contextlib import ExitStack

from nbdserver.cli_output import print_json, range_table, show
from nbdserver.cli_progress import progress
from objstore.access.blocking import BlockingConnection
from objstore.access.transfer import PIECE_BYTES


def diff(store: BlockingConnection, arguments: argparse.Namespace) -> None:
    """One line for each range that has changed."""
    older, newer = arguments.range
    rows = []
    with store.open(older, read_only=True) as since, store.open(newer, read_only=True) as vdi:
        at = 0
        for change in vdi.changes(since):
            if change.changed:
                state = "hole" if change.hole else "zero" if change.zero else "data"
                rows.append({"offset_bytes": at, "length_bytes": change.length_bytes, "state": state})
            at += change.length_bytes
    show(rows, range_table, as_json=arguments.json)


def export_diff(store: BlockingConnection, arguments: argparse.Namespace) -> None:
    """The stream to stdout or a file."""
    older, newer = arguments.range
    with ExitStack() as stack:
        pieces = store.export_diff(older, newer)
        first = next(pieces)  # what can't be exported leaves no file behind
        out = sys.stdout.buffer if arguments.file == "-" else stack.enter_context(open(arguments.file, "wb"))
        with progress(f"exporting {newer}"):
            for piece in itertools.chain([first], pieces):
                out.write(piece)
        out.flush()


def import_diff(store: BlockingConnection, arguments: argparse.Namespace) -> None:
    """A stream from stdin or a file onto a VDI."""
    with ExitStack() as stack:
        source = sys.stdin.buffer if arguments.file == "-" else stack.enter_context(open(arguments.file, "rb"))
        with progress("importing"):
            made = store.import_diff(iter(lambda: source.read(PIECE_BYTES), b""), arguments.name, tag=arguments.tag)
    if arguments.json:
        print_json(made)
    else:
        print(f"imported {made.name}")
