"""The commands for deleted VDIs: what is in the trash, back from it, away for good."""

import argparse

from nbdserver.cli_output import print_json, show, trash_table, vdi_details
from nbdserver.cli_progress import progress
from objstore.access.blocking import BlockingConnection


def trash(store: BlockingConnection, arguments: argparse.Namespace) -> None:
    """`trash`."""
    show(list(store.trash()), trash_table, as_json=arguments.json)


def undelete(store: BlockingConnection, arguments: argparse.Namespace) -> None:
    """`vdi undelete`."""
    back = store.undelete(arguments.name, arguments.new, vdi_id=arguments.vdi_id)
    show(back, vdi_details, as_json=arguments.json)


def purge(store: BlockingConnection, arguments: argparse.Namespace) -> None:
    """`vdi purge`."""
    with progress(f"deleting {arguments.name}"):
        store.purge(arguments.name, vdi_id=arguments.vdi_id)
    if arguments.json:
        print_json({"deleted": arguments.name})
    else:
        print(f"deleted {arguments.name} for good")
