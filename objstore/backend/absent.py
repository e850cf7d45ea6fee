"""A zone that is not here: every call fails and says why."""

from typing import NoReturn

from objstore.backend.base import Backend, Entry, Handle, Writer, ZoneFailed


class AbsentBackend(Backend):
    """Stands for a zone whose directory is missing, empty, damaged or out of reach. reason: which of these."""

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason

    def _fail(self) -> NoReturn:
        raise ZoneFailed(f"the zone is not here: {self.reason} zone={self.path}")

    def put(self, name: str, data: bytes) -> None:
        self._fail()

    def put_stream(self, name: str) -> Writer:
        self._fail()

    def put_if_absent(self, name: str, data: bytes) -> None:
        self._fail()

    def replace_if(self, name: str, expected: bytes, data: bytes) -> None:
        self._fail()

    def get(self, name: str) -> bytes:
        self._fail()

    def create(self, name: str, size_bytes: int, *, reserve_bytes: int = 0) -> Handle:
        self._fail()

    def open(self, name: str) -> Handle:
        self._fail()

    def list(self, prefix: str) -> list[Entry]:
        self._fail()

    def delete(self, name: str) -> None:
        self._fail()

    def delete_all(self, prefix: str) -> None:
        self._fail()

    def retire(self, name: str) -> None:
        self._fail()

    def free_bytes(self) -> int:
        self._fail()

    def used_bytes(self) -> int:
        self._fail()

    def check(self) -> None:
        self._fail()

    def lock(self, note: str) -> None:
        self._fail()

    def lock_note(self) -> str | None:
        self._fail()

    def close(self) -> None:
        """Nothing is open."""
