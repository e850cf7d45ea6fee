"""`vdi download`, `vdi upload`, `vdi map`: disks to and from files and pipes, holes kept."""

import argparse
import fcntl
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import IO, Final

from nbdserver.cli_output import print_json, range_table, show
from nbdserver.cli_progress import progress_bar
from objstore.access.blocking import BlockingConnection
from objstore.access.transfer import PIECE_BYTES, Hole
from objstore.errors import StoreError

ZEROS: Final = bytes(PIECE_BYTES)


def download(store: BlockingConnection, arguments: argparse.Namespace) -> None:
    """Write a range to stdout or a file."""
    with ExitStack() as stack:
        vdi = stack.enter_context(store.open(arguments.name, read_only=True))
        total = arguments.length or max(0, vdi.size_bytes - arguments.offset)
        parts = vdi.download(arguments.offset, arguments.length)
        first = next(parts, b"")  # a range that is impossible leaves no file behind
        out = sys.stdout.buffer if arguments.file == "-" else stack.enter_context(open(arguments.file, "wb"))
        sparse = _skips_holes(out)
        done = stack.enter_context(progress_bar(f"downloading {arguments.name}", total))
        for part in _chained(first, parts):
            if isinstance(part, bytes):
                out.write(part)
            elif sparse:
                out.seek(part.length_bytes, os.SEEK_CUR)
            else:
                for at in range(0, part.length_bytes, PIECE_BYTES):
                    out.write(ZEROS[: part.length_bytes - at])
            done(len(part) if isinstance(part, bytes) else part.length_bytes)
        out.flush()
        if sparse:
            out.truncate(out.tell())


def _chained(first: bytes | Hole, parts: Iterator[bytes | Hole]) -> Iterator[bytes | Hole]:
    yield first
    yield from parts


def _skips_holes(out: IO[bytes]) -> bool:
    """Whether seeking leaves zeros: in a regular file that holds nothing behind its position."""
    try:
        number = out.fileno()
    except OSError:
        return False
    found = os.fstat(number)
    if not stat.S_ISREG(found.st_mode) or fcntl.fcntl(number, fcntl.F_GETFL) & os.O_APPEND:
        return False
    out.flush()
    return found.st_size <= os.lseek(number, 0, os.SEEK_CUR)


def upload(store: BlockingConnection, arguments: argparse.Namespace) -> None:
    """Write stdin or a file to a range; say how much that was."""
    with ExitStack() as stack:
        vdi = stack.enter_context(store.open(arguments.name))
        source = sys.stdin.buffer if arguments.file == "-" else stack.enter_context(open(arguments.file, "rb"))
        total = arguments.length or max(0, vdi.size_bytes - arguments.offset)
        done = stack.enter_context(progress_bar(f"uploading {arguments.name}", total))
        count = vdi.upload(
            _counted(_items(source), done), arguments.offset, arguments.length, zero_rest=arguments.zero_rest
        )
    if count < arguments.length and not arguments.zero_rest:
        raise StoreError(
            f"the stream ended after {count} of {arguments.length} bytes; these were written, the rest is as it was"
        )
    if arguments.json:
        print_json({"name": arguments.name, "bytes_done": count})
    else:
        print(f"uploaded {count} bytes to {arguments.name}")


def _items(source: IO[bytes]) -> Iterator[bytes | Hole]:
    """What a stream holds; the holes of a regular file are not read."""
    try:
        number = source.fileno()
        regular = stat.S_ISREG(os.fstat(number).st_mode)
    except OSError:
        regular = False
    if not regular:
        while data := source.read(PIECE_BYTES):
            yield data
        return
    at, end = source.tell(), os.fstat(number).st_size
    while at < end:
        try:
            start = min(end, os.lseek(number, at, os.SEEK_DATA))
        except OSError:  # nothing but a hole to the end, or the file system knows no holes: then reading tells
            start = end if _is_hole(number, at) else at
        if start > at:
            yield Hole(start - at)
        at = start
        stop = os.lseek(number, at, os.SEEK_HOLE) if at < end else end
        while at < stop and (data := os.pread(number, min(PIECE_BYTES, stop - at), at)):
            yield data
            at += len(data)
        if at < stop:
            return  # the file became shorter


def _is_hole(number: int, at: int) -> bool:
    try:
        return os.lseek(number, at, os.SEEK_HOLE) == at
    except OSError:
        return False


def _counted(items: Iterator[bytes | Hole], done: Callable[[int], object]) -> Iterator[bytes | Hole]:
    for item in items:
        yield item
        done(item.length_bytes if isinstance(item, Hole) else len(item))


def show_map(store: BlockingConnection, arguments: argparse.Namespace) -> None:
    """One line for each range."""
    with store.open(arguments.name, read_only=True) as vdi:
        at = arguments.offset
        rows = []
        for extent in vdi.map(arguments.offset, arguments.length):
            state = "hole" if extent.hole else "zero" if extent.zero else "data"
            rows.append({"offset_bytes": at, "length_bytes": extent.length_bytes, "state": state})
            at += extent.length_bytes
    show(rows, range_table, as_json=arguments.json)
