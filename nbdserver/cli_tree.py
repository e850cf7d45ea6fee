"""Which VDI or snapshot comes from which, as a tree: for people, for programs, for Graphviz."""

import json
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from objstore.volume.status import SnapshotStatus, VdiStatus


class Node(msgspec.Struct, kw_only=True):
    """A VDI, a snapshot, or a VDI that was deleted and has snapshots left (kind: vdi, snapshot, deleted)."""

    name: str
    kind: str
    children: list["Node"] = msgspec.field(default_factory=list)


def family(vdis: Sequence[VdiStatus], snapshots: Sequence[SnapshotStatus]) -> list[Node]:
    """What comes from nothing else, with what comes from it below: a VDI's snapshots, a snapshot's clones, and VDIs
    that were cloned as they were."""
    nodes = {vdi.name: Node(name=vdi.name, kind="vdi") for vdi in vdis}
    deleted: dict[str, Node] = {}
    for snapshot in snapshots:
        owners = deleted if snapshot.vdi_deleted else nodes
        owner = owners.setdefault(snapshot.vdi, Node(name=snapshot.vdi, kind="deleted"))
        nodes[snapshot.name] = Node(name=snapshot.name, kind="snapshot")
        owner.children.append(nodes[snapshot.name])
    roots = list(deleted.values())
    for vdi in vdis:
        parent = nodes.get(vdi.parent)
        if vdi.parent and parent is None:  # cloned as it was, and deleted since
            parent = deleted.setdefault(vdi.parent, Node(name=vdi.parent, kind="deleted"))
            if parent not in roots:
                roots.append(parent)
        (parent.children if parent is not None else roots).append(nodes[vdi.name])
    return sorted(roots, key=lambda node: node.name)


def tree_text(roots: Sequence[Node]) -> str:
    """One line for each, the snapshots and clones of it indented below."""
    return "\n".join(_lines(roots, 0))


def _lines(nodes: Iterable[Node], depth: int) -> Iterator[str]:
    for node in nodes:
        yield "  " * depth + node.name + (" (deleted)" if node.kind == "deleted" else "")
        yield from _lines(node.children, depth + 1)


def tree_dot(roots: Sequence[Node]) -> str:
    """The same as a graph in the DOT language."""
    return "\n".join(["digraph vdis {", *_edges(roots), "}"])


def _edges(nodes: Iterable[Node]) -> Iterator[str]:
    shapes = {"vdi": "box", "snapshot": "ellipse", "deleted": "plaintext"}
    for node in nodes:
        yield f"  {_quoted(node)} [shape={shapes[node.kind]}];"
        for child in node.children:
            yield f"  {_quoted(node)} -> {_quoted(child)};"
        yield from _edges(node.children)


def _quoted(node: Node) -> str:
    return json.dumps(node.name + (" (deleted)" if node.kind == "deleted" else ""), ensure_ascii=False)
