"""Zones for the offline check that are no directories: objects by name, in memory or in a fake file system."""

from collections.abc import MutableMapping, Sequence

from objstore.check.check import check_store
from objstore.check.report import Report
from tests.support.fakefs import FakeFileSystem


class ObjectZone:
    """Objects by name; what is put and removed changes the mapping."""

    def __init__(self, label: str, objects: MutableMapping[str, bytearray]) -> None:
        self.label = label
        self.objects = objects

    def list(self, folder: str) -> Sequence[str]:
        start = f"{folder}/" if folder else ""
        return sorted({name[len(start) :].split("/")[0] for name in self.objects if name.startswith(start)})

    def size(self, name: str) -> int | None:
        data = self.objects.get(name)
        return None if data is None else len(data)

    def read(self, name: str, offset: int, length: int) -> bytes:
        if name not in self.objects:
            raise FileNotFoundError(name)
        return bytes(self.objects[name][offset : offset + length])

    def put(self, name: str, data: bytes) -> None:
        self.objects[name] = bytearray(data)

    def remove(self, name: str) -> None:
        self.objects.pop(name, None)


def files_zone(fs: FakeFileSystem, root: str) -> ObjectZone:
    """The files that a fake file system has below `root` now, except what is no part of the format."""
    names = [name for name in fs.paths_below(root) if not name.startswith(("tmp/", "spare/"))]
    return ObjectZone(root, {name: bytearray(fs.content(f"{root}/{name}")) for name in names})


def check_files(systems: Sequence[FakeFileSystem]) -> Report:
    """Check the store on /zone0, /zone1, ... of these file systems."""
    return check_store([files_zone(fs, f"/zone{index}") for index, fs in enumerate(systems)])
