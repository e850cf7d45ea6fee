"""The commands for snapshots and clones, and for what changes a VDI as a whole."""

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


def rename(admin: Admin, arguments: argparse.Namespace) -> None:
    """`vdi rename`."""
    show(admin.rename(arguments.name, arguments.new), vdi_details, as_json=arguments.json)


def resize(admin: Admin, arguments: argparse.Namespace) -> None:
    """`vdi resize`."""
    with progress(f"resizing {arguments.name}"):
        resized = admin.resize(
            arguments.name, arguments.size_bytes, force=arguments.force, reconnect=arguments.reconnect
        )
    show(resized, vdi_details, as_json=arguments.json)


def rollback(admin: Admin, arguments: argparse.Namespace) -> None:
    """`vdi rollback`."""
    with progress(f"going back to {arguments.name}"):
        undo = admin.rollback(arguments.name, force=arguments.force)
    if arguments.json:
        print_json(undo)
        return
    print(f"{undo.vdi} is as it was at {arguments.name}; what it was before is {undo.name}")
    if arguments.force:
        print(f"no client gets in until `sheepfold vdi resume {undo.vdi}`")


def resume(admin: Admin, arguments: argparse.Namespace) -> None:
    """`vdi resume`."""
    show(admin.resume(arguments.name), vdi_details, as_json=arguments.json)


COMMANDS = {
    "snapshot": snapshot,
    "snapshots": snapshots,
    "protect": protect,
    "unprotect": unprotect,
    "clone": clone,
    "tree": tree,
    "rename": rename,
    "resize": resize,
    "rollback": rollback,
    "resume": resume,
}
