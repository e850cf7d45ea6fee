"""`vdi diff`: what has changed between snapshots."""

import argparse

from nbdserver.cli_output import print_json
from objstore.access.blocking import BlockingConnection


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
    if arguments.json:
        print_json(rows)
        return
    print(f"{'OFFSET':>16}  {'LENGTH':>16}  STATE")
    for row in rows:
        print(f"{row['offset_bytes']:>16}  {row['length_bytes']:>16}  {row['state']}")
