"""The commands for snapshots and clones."""

import argparse

from nbdserver.cli_admin import Admin
from nbdserver.cli_output import print_json, show, snapshot_details, snapshot_table, vdi_details
from nbdserver.cli_progress import progress
from nbdserver.cli_tree import family, tree_dot, tree_text


def snapshot(admin: Admin, arguments: argparse.Namespace) -> None:
    """`vdi snapshot`."""
    with progress(f"taking a snapshot of {arguments.name}"):
        taken = admin.create_snapshot(
            arguments.name, arguments.tag, skip_unchanged=arguments.skip_unchanged, protected=arguments.protect
        )
    if arguments.json:
        print_json(taken)
    elif taken.taken:
        print(snapshot_details(taken.snapshot))
    else:
        print(f"nothing was written to {arguments.name} since {taken.snapshot.name}")


def snapshots(admin: Admin, arguments: argparse.Namespace) -> None:
    """`vdi snapshots`."""
    show(admin.snapshots(arguments.name), snapshot_table, as_json=arguments.json)


def protect(admin: Admin, arguments: argparse.Namespace) -> None:
    """`vdi protect`."""
    show(admin.protect_snapshot(arguments.name, protected=True), snapshot_details, as_json=arguments.json)


def unprotect(admin: Admin, arguments: argparse.Namespace) -> None:
    """`vdi unprotect`."""
    show(admin.protect_snapshot(arguments.name, protected=False), snapshot_details, as_json=arguments.json)


def clone(admin: Admin, arguments: argparse.Namespace) -> None:
    """`vdi clone`."""
    with progress(f"cloning {arguments.source}"):
        made = admin.clone(arguments.source, arguments.name, copies=arguments.copies, mode=arguments.mode)
    show(made, vdi_details, as_json=arguments.json)


def tree(admin: Admin, arguments: argparse.Namespace) -> None:
    """`vdi tree`."""
    roots = family(admin.vdis(), admin.snapshots(None))
    if arguments.dot:
        print(tree_dot(roots))
    else:
        show(roots, tree_text, as_json=arguments.json)


COMMANDS = {
    "snapshot": snapshot,
    "snapshots": snapshots,
    "protect": protect,
    "unprotect": unprotect,
    "clone": clone,
    "tree": tree,
}
