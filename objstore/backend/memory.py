"""A zone in memory: the contract at its plainest, for tests and as the model of the others.

Several backends may share one `MemoryStorage`, as several processes share a directory. Everything written is at once as
durable as it will ever be; nothing survives the process.
"""

import threading
from collections.abc import Sequence
from typing import Final

from objstore.backend.base import Backend, Conflict, Entry, Handle, Writer
from objstore.backend.names import check_name, prefix_of
from objstore.errors import Busy, Exists, InvalidRequest, NoSpace, NotFound

CAPACITY_BYTES: Final = 1 << 30


class MemoryStorage:
    """What a zone holds: at most capacity_bytes in named objects, and the lock's note."""

    def __init__(self, capacity_bytes: int = CAPACITY_BYTES) -> None:
        self.capacity_bytes = capacity_bytes
        self.objects: dict[str, bytearray] = {}
        self.holder: MemoryBackend | None = None
        self.note = ""
        self.mutex = threading.RLock()

    def used_bytes(self) -> int:
        return sum(len(data) for data in self.objects.values())

    def place(self, name: str, data: bytearray) -> None:
        """Store the object in place of any former one, or NoSpace. The caller holds the mutex."""
        self.check_room(name, len(data) - len(self.objects.get(name, b"")))
        self.objects[name] = data

    def check_room(self, name: str, needed_bytes: int) -> None:
        free_bytes = self.capacity_bytes - self.used_bytes()
        if needed_bytes > free_bytes:
            raise NoSpace(f"the zone is full: {free_bytes=} {needed_bytes=} name={name} zone=memory")


class MemoryBackend(Backend):
    """The contract of `Backend` over a MemoryStorage."""

    def __init__(self, storage: MemoryStorage | None = None) -> None:
        self._storage = storage or MemoryStorage()

    def put(self, name: str, data: bytes) -> None:
        check_name(name)
        with self._storage.mutex:
            self._storage.place(name, bytearray(data))

    def put_stream(self, name: str) -> "MemoryWriter":
        check_name(name)
        return MemoryWriter(self, name)

    def put_if_absent(self, name: str, data: bytes) -> None:
        check_name(name)
        with self._storage.mutex:
            self._check_absent(name)
            self._storage.place(name, bytearray(data))

    def replace_if(self, name: str, expected: bytes, data: bytes) -> None:
        check_name(name)
        with self._storage.mutex:
            found = self._storage.objects.get(name)
            if found is None or bytes(found) != expected:
                raise Conflict(f"other contents than expected: name={name} zone=memory")
            self._storage.place(name, bytearray(data))

    def get(self, name: str) -> bytes:
        return bytes(self._find(name))

    def create(self, name: str, size_bytes: int, *, reserve_bytes: int = 0) -> Handle:
        check_name(name)
        if size_bytes <= 0:
            raise InvalidRequest(f"an object needs a size: name={name} size_bytes={size_bytes}")
        with self._storage.mutex:
            self._check_absent(name)
            self._storage.check_room(name, size_bytes + reserve_bytes)
            data = self._storage.objects[name] = bytearray(size_bytes)
        return MemoryHandle(name, data)

    def open(self, name: str) -> Handle:
        return MemoryHandle(name, self._find(name))

    def list(self, prefix: str) -> list[Entry]:
        folder = prefix_of(prefix)
        start = f"{folder}/" if folder else ""
        with self._storage.mutex:
            return sorted(
                Entry(name, len(data)) for name, data in self._storage.objects.items() if name.startswith(start)
            )

    def delete(self, name: str) -> None:
        check_name(name)
        with self._storage.mutex:
            self._storage.objects.pop(name, None)

    def delete_all(self, prefix: str) -> None:
        for entry in self.list(prefix):
            self.delete(entry.name)

    def retire(self, name: str) -> None:
        self.delete(name)

    def free_bytes(self) -> int:
        with self._storage.mutex:
            return self._storage.capacity_bytes - self._storage.used_bytes()

    def used_bytes(self) -> int:
        with self._storage.mutex:
            return self._storage.used_bytes()

    def check(self) -> None:
        return None

    def lock(self, note: str) -> None:
        with self._storage.mutex:
            if self._storage.holder is not None:
                raise Busy(f"the zone is in use: holder={self._storage.note!r} zone=memory")
            self._storage.holder = self
            self._storage.note = note

    def lock_note(self) -> str | None:
        with self._storage.mutex:
            return None if self._storage.holder is None else self._storage.note

    def close(self) -> None:
        with self._storage.mutex:
            if self._storage.holder is self:
                self._storage.holder = None

    def _check_absent(self, name: str) -> None:
        if name in self._storage.objects:
            raise Exists(f"the name is taken: name={name} zone=memory")

    def _find(self, name: str) -> bytearray:
        check_name(name)
        with self._storage.mutex:
            data = self._storage.objects.get(name)
        if data is None:
            raise NotFound(f"no such object: name={name} zone=memory")
        return data


class MemoryHandle(Handle):
    """A Handle over the bytes of one object."""

    def __init__(self, name: str, data: bytearray) -> None:
        self.name = name
        self.size_bytes = len(data)
        self._data = data

    def write(self, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        piece = b"".join(buffers)
        if offset_bytes + len(piece) > self.size_bytes:
            raise InvalidRequest(
                f"write past the space set aside: {offset_bytes=} length_bytes={len(piece)}"
                f" size_bytes={self.size_bytes} name={self.name} zone=memory"
            )
        self._data[offset_bytes : offset_bytes + len(piece)] = piece

    def write_soon(self, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        self.write(offset_bytes, buffers)

    def write_around(self, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        self.write(offset_bytes, buffers)

    def write_durable(self, offset_bytes: int, buffers: Sequence[memoryview]) -> None:
        self.write(offset_bytes, buffers)

    def sync(self) -> None:
        return None

    def truncate(self, size_bytes: int) -> None:
        if not 0 <= size_bytes <= self.size_bytes:
            raise InvalidRequest(f"truncate can't grow: {size_bytes=} of={self.size_bytes} name={self.name}")
        del self._data[size_bytes:]
        self.size_bytes = size_bytes

    def read(self, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        start = offset_bytes
        for buffer in buffers:
            piece = self._data[offset_bytes : offset_bytes + buffer.nbytes]
            buffer[: len(piece)] = piece
            offset_bytes += len(piece)
            if len(piece) < buffer.nbytes:
                break
        return offset_bytes - start

    def read_nowait(self, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        return self.read(offset_bytes, buffers)

    def read_uncached(self, offset_bytes: int, buffers: Sequence[memoryview]) -> int:
        return self.read(offset_bytes, buffers)

    def close(self) -> None:
        return None


class MemoryWriter(Writer):
    """A whole object under construction, not in the storage yet."""

    def __init__(self, backend: MemoryBackend, name: str) -> None:
        self._backend = backend
        self._name = name
        self._data = bytearray()

    def write(self, buffers: Sequence[memoryview | bytes]) -> None:
        for buffer in buffers:
            self._data += buffer

    def commit(self) -> None:
        self._backend.put(self._name, bytes(self._data))

    def abort(self) -> None:
        self._data.clear()
