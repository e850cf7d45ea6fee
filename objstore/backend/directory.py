"""A zone in one directory of a mounted file system.

    <zone>/lock          locked by the process that owns the zone; its text says who that is
    <zone>/tmp/N         objects under construction; whatever is there when the lock is taken is left over from a crash
    <zone>/spare/SIZE-N  retired files of SIZE bytes that `create` uses again (recycle_files_max > 0 only)
    <zone>/spare/ballast space kept back for a file system that is full (ballast_bytes > 0 only)
    <zone>/NAME          object NAME

What makes a name durable: the file is complete and synced under its temporary name, moves with one rename or link, and
then every folder from the one that holds it up to the first that was known durable is synced.
Files are readable by their owner alone, except the lock.
Nothing is written to the directory before the first lock, put or create, so that a foreign one can be looked at first.
Threads: any number, as the contract says. `_folder_lock` guards which folders exist, SparePool has its own lock.
"""

import errno
import itertools
import os
import stat
import threading
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from objstore.backend.ballast import BALLAST_NAME, Ballast
from objstore.backend.base import Backend, Conflict, Entry, Handle, Writer, ZoneFailed
from objstore.backend.file_handle import FileHandle, ZoneAbilities, read_all, write_all
from objstore.backend.filesystem import OS_FILE_SYSTEM, FileSystem
from objstore.backend.names import check_name, folder_of, is_name, prefix_of
from objstore.backend.oserrors import FULL_ERRNOS, failed, translating
from objstore.backend.spare import SPARE_FOLDER, SparePool
from objstore.errors import Busy, InvalidRequest, NoSpace, NotFound

LOCK_NAME: Final = "lock"
TMP_FOLDER: Final = "tmp"
LOCK_NOTE_BYTES_MAX: Final = 1024

ALLOCATED_BYTES_MIN: Final = 1 << 20
"""A piece of a put that is so long gets its space before it is written: 48 files of 8 MiB, four at a time, were written
and synced at 1120 MB/s instead of 710."""

_OWN: Final = frozenset({LOCK_NAME, TMP_FOLDER, SPARE_FOLDER})
_NOT_OBJECTS: Final = _OWN | {"lost+found"}
_READ: Final = os.O_RDONLY | os.O_CLOEXEC
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_ZEROS: Final = memoryview(bytes(1 << 18))
_ST_BLOCK_BYTES: Final = 512


class DirectoryBackend(Backend):
    """The contract of `Backend` over the directory `path`, which must exist.

    recycle_files_max: most retired files kept for `create`; 0 unlinks them. ballast_bytes: kept back in a file, which
    is given up where a call that asks for no reserve (not clients' data: records, names, what frees space) finds none.
    Raises NotFound, ZoneFailed if the directory can't be opened.
    """

    def __init__(
        self, path: str, *, fs: FileSystem = OS_FILE_SYSTEM, recycle_files_max: int = 0, ballast_bytes: int = 0
    ) -> None:
        self.path = path
        self._fs = fs
        self._able = ZoneAbilities()
        self._lock_fd = -1
        self._tmp_numbers = itertools.count()
        self._replace_lock = threading.Lock()
        self._folder_lock = threading.Lock()
        self._durable_folders = {""}
        self._folder_users: Counter[str] = Counter()
        with self._calls("open", ""):
            self._root = fs.open(path, _FOLDER)
            self.device = fs.fstat(self._root).st_dev
        self._spares = SparePool(fs, self._root, recycle_files_max)
        self._ballast = Ballast(fs, self._root, f"{SPARE_FOLDER}/{BALLAST_NAME}", ballast_bytes)

    # whole objects

    def put(self, name: str, data: bytes) -> None:
        writer = self.put_stream(name)
        try:
            writer.write([data])
            writer.commit()
        finally:
            writer.abort()

    def put_stream(self, name: str) -> "FileWriter":
        _check_object_name(name)
        with self._calls("put_stream", name):
            tmp, fd = self._open_tmp()
        return FileWriter(self, name, tmp, fd)

    def put_if_absent(self, name: str, data: bytes) -> None:
        writer = self.put_stream(name)
        try:
            writer.write([data])
            writer.commit_new()
        finally:
            writer.abort()

    def replace_if(self, name: str, expected: bytes, data: bytes) -> None:
        with self._replace_lock:
            try:
                found = self.get(name)
            except NotFound as error:
                raise Conflict(f"nothing there to replace: name={name} zone={self.path}") from error
            if found != expected:
                raise Conflict(f"other contents than expected: name={name} zone={self.path}")
            self.put(name, data)

    def get(self, name: str) -> bytes:
        _check_object_name(name)
        with self._calls("get", name):
            fd, size_bytes = self._open_file(name)
            try:
                return read_all(self._fs, fd, size_bytes)
            finally:
                self._fs.close(fd)

    # open objects

    def create(self, name: str, size_bytes: int, *, reserve_bytes: int = 0) -> Handle:
        _check_object_name(name)
        if size_bytes <= 0:
            raise InvalidRequest(f"an object needs a size: name={name} size_bytes={size_bytes}")
        while True:
            try:
                return self._create(name, size_bytes, reserve_bytes)
            except NoSpace:
                if not self._make_room(ballast=not reserve_bytes):
                    raise

    def open(self, name: str) -> Handle:
        _check_object_name(name)
        with self._calls("open", name):
            fd, size_bytes = self._open_file(name)
        return FileHandle(self._fs, self._able, self.path, name, fd, size_bytes, writable=False)

    # the set of objects

    def list(self, prefix: str) -> list[Entry]:
        with self._calls("list", prefix):
            found = [
                Entry(name, status.st_size)
                for name, status in self._walk(prefix_of(prefix), hidden=_NOT_OBJECTS)
                if is_name(name)
            ]
        found.sort()
        return found

    def delete(self, name: str) -> None:
        _check_object_name(name)
        with self._calls("delete", name):
            try:
                self._fs.unlink(name, dir_fd=self._root)
            except FileNotFoundError:
                return
            self._drop_empty_folders(folder_of(name))
            self._renew_ballast()

    def delete_all(self, prefix: str) -> None:
        folder = prefix_of(prefix).rstrip("/")
        for entry in self.list(prefix):
            with self._calls("delete_all", entry.name), suppress(FileNotFoundError):
                self._fs.unlink(entry.name, dir_fd=self._root)
        with self._calls("delete_all", prefix):
            self._sync_if_there(folder)
            self._drop_empty_folders(folder)
            self._sync_if_there(folder_of(folder))
            self._renew_ballast()

    def _sync_if_there(self, folder: str) -> None:
        with suppress(FileNotFoundError), self._open_folder(folder) as fd:
            self._fs.fsync(fd)

    def retire(self, name: str) -> None:
        _check_object_name(name)
        if not self._spares.files_max:
            self.delete(name)
            return
        folder = folder_of(name)
        with self._calls("retire", name):
            try:
                status = self._fs.stat(name, dir_fd=self._root, follow_symlinks=False)
                self._make_durable_folder(SPARE_FOLDER)
                with self._folder_in_use(folder):
                    # A second name is somebody else's, say a backup made of hard links: never write into that.
                    spare = self._spares.take_from(name, status.st_size) if status.st_nlink == 1 else None
                    if spare is None:
                        self._fs.unlink(name, dir_fd=self._root)
                    else:
                        # Before anyone may write into the file again its old name has to be gone for good: a power
                        # cut would else show the new contents under it.
                        self._sync_folder(folder)
                        self._spares.put_in(spare)
            except FileNotFoundError:
                return
            self._drop_empty_folders(folder)
            self._renew_ballast()

    def free_bytes(self) -> int:
        """Space for new objects: what the file system gives this user, and what makes room on demand."""
        with self._calls("free_bytes", ""):
            return self._disk_free_bytes() + self._spares.total_bytes + self._ballast.held_bytes

    def used_bytes(self) -> int:
        """The blocks of every file in the zone (one stat per file)."""
        with self._calls("used_bytes", ""):
            return sum(status.st_blocks * _ST_BLOCK_BYTES for _, status in self._walk("", hidden=frozenset()))

    def check(self) -> None:
        with self._calls("check", ""):
            here, opened = self._fs.stat(self.path), self._fs.fstat(self._root)
            if (here.st_dev, here.st_ino) != (opened.st_dev, opened.st_ino):
                raise ZoneFailed(f"another directory has taken the place of the zone: zone={self.path}")
            if self._fs.fstatvfs(self._root).f_flag & os.ST_RDONLY:
                raise ZoneFailed(f"the file system has become read-only: zone={self.path}")

    # ownership

    def lock(self, note: str) -> None:
        text = note.encode() + b"\n"
        if b"\n" in text[:-1] or len(text) > LOCK_NOTE_BYTES_MAX:
            raise InvalidRequest(f"a lock note is one line of at most {LOCK_NOTE_BYTES_MAX} bytes: note={note!r}")
        with self._calls("lock", LOCK_NAME):
            fd = self._fs.open(LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644, dir_fd=self._root)
            try:
                try:
                    self._fs.lock_exclusive(fd)
                except BlockingIOError as error:
                    holder = self._read_note(fd)
                    raise Busy(f"the zone is in use: holder={holder!r} zone={self.path}") from error
                # Overwritten, then cut: the file keeps its block, so a zone that is full can still be locked.
                write_all(self._fs, fd, [memoryview(text)], 0)
                self._fs.ftruncate(fd, len(text))
                self._clean_up()
            except BaseException:
                self._fs.close(fd)
                raise
            self._lock_fd = fd
            self._renew_ballast()

    def lock_note(self) -> str | None:
        with self._calls("lock_note", LOCK_NAME):
            try:
                fd = self._fs.open(LOCK_NAME, _READ, dir_fd=self._root)
            except FileNotFoundError:
                return None
            try:
                return self._read_note(fd) if self._fs.is_locked(fd) else None
            finally:
                self._fs.close(fd)

    def foreign_names(self, known: Container[str]) -> Sequence[str]:
        """What lies directly in the zone's directory and is neither `known` nor this backend's own, sorted.

        A store asks before it initialises or locks a directory and refuses one that holds anything.
        """
        with self._calls("foreign_names", ""):
            return sorted(name for name in self._names_in("") if name not in known and name not in _NOT_OBJECTS)

    def close(self) -> None:
        fds = [fd for fd in (self._lock_fd, self._root) if fd >= 0]
        self._lock_fd = self._root = -1
        with self._calls("close", ""):
            for fd in fds:
                self._fs.close(fd)

    # building objects

    def _create(self, name: str, size_bytes: int, reserve_bytes: int) -> Handle:
        with self._calls("create", name):
            spare = self._spares.give_out(size_bytes)
            source, fd = spare, -1
            try:
                free_bytes = self._disk_free_bytes()
                if reserve_bytes:  # the ballast is a part of the reserve
                    reserve_bytes = max(1, reserve_bytes - self._ballast.held_bytes)
                needed_bytes = reserve_bytes + (0 if spare else size_bytes)
                if free_bytes < needed_bytes:
                    raise NoSpace(f"the zone is full: {free_bytes=} {needed_bytes=} name={name} zone={self.path}")
                if source is None:
                    source, fd = self._open_tmp()
                    self._allocate(fd, size_bytes)
                    self._fs.fsync(fd)
                else:
                    fd = self._fs.open(source, os.O_RDWR | os.O_CLOEXEC, dir_fd=self._root)
                self._link(source, name)
            except BaseException as error:
                if fd >= 0:
                    self._fs.close(fd)
                if spare is not None and isinstance(error, FileExistsError):
                    self._spares.put_in(spare)
                elif source is not None:
                    self._unlink_leftover(source)
                raise
            handle = FileHandle(self._fs, self._able, self.path, name, fd, size_bytes)
            handle.recycled = spare is not None
            return handle

    def _open_tmp(self) -> tuple[str, int]:
        """A new file under a temporary name. That name need not survive anything."""
        self._make_durable_folder(TMP_FOLDER)
        while True:
            tmp = f"{TMP_FOLDER}/{next(self._tmp_numbers)}"
            try:
                return tmp, self._fs.open(tmp, _NEW, 0o600, dir_fd=self._root)
            except FileExistsError:
                continue  # left over from a crash and not cleaned up, as nobody has locked the zone

    def _unlink_leftover(self, path: str) -> None:
        """Remove a file that never became an object. Where that fails the next holder of the lock does it; the error
        that led here is the one to report."""
        with suppress(OSError):
            self._fs.unlink(path, dir_fd=self._root)

    def _allocate(self, fd: int, size_bytes: int) -> None:
        try:
            self._fs.posix_fallocate(fd, 0, size_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            for at in range(0, size_bytes, len(_ZEROS)):
                write_all(self._fs, fd, [_ZEROS[: size_bytes - at]], at)

    def _rename(self, tmp: str, name: str) -> None:
        """The finished file becomes object `name`, durably, in place of any former one."""
        with self._folder_in_use(folder_of(name)) as folder:
            self._fs.rename(tmp, name, src_dir_fd=self._root, dst_dir_fd=self._root)
            self._sync_folder(folder)

    def _link(self, source: str, name: str) -> None:
        """The finished file becomes object `name`, durably; FileExistsError if the name is taken.

        A power cut between the two calls leaves both names: whoever takes the lock next removes the temporary one, and
        a spare with a second name.
        """
        with self._folder_in_use(folder_of(name)) as folder:
            self._fs.link(source, name, src_dir_fd=self._root, dst_dir_fd=self._root)
            self._fs.unlink(source, dir_fd=self._root)
            self._sync_folder(folder)

    # folders

    @contextmanager
    def _folder_in_use(self, folder: str) -> Iterator[str]:
        """The folder exists, durably, and is not removed inside the `with`."""
        with self._folder_lock:
            self._make_durable(folder)
            self._folder_users[folder] += 1
        try:
            yield folder
        finally:
            with self._folder_lock:
                self._folder_users[folder] -= 1
                if not self._folder_users[folder]:
                    del self._folder_users[folder]

    def _make_durable_folder(self, folder: str) -> None:
        if folder not in self._durable_folders:
            with self._folder_lock:
                self._make_durable(folder)

    def _make_durable(self, folder: str) -> None:
        """Make the folder and those above it; holds _folder_lock. One that was found is synced all the same: its maker
        may have been killed before it came to that."""
        if folder in self._durable_folders:
            return
        above = folder_of(folder)
        self._make_durable(above)
        try:
            self._fs.mkdir(folder, 0o755, dir_fd=self._root)
        except FileExistsError:
            pass
        self._sync_folder(above)
        self._durable_folders.add(folder)

    def _drop_empty_folders(self, folder: str) -> None:
        """Remove the folder and those above it as far as they are empty; the topmost ones stay."""
        while "/" in folder:
            with self._folder_lock:
                if folder in self._folder_users:
                    return
                try:
                    self._fs.rmdir(folder, dir_fd=self._root)
                except OSError as error:
                    if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                        return
                    raise
                self._durable_folders.discard(folder)
            folder = folder_of(folder)

    def _sync_folder(self, folder: str) -> None:
        try:
            with self._open_folder(folder) as fd:
                self._fs.fsync(fd)
        except OSError as error:
            # Whatever the errno: a name has changed and may or may not last, so this is never "nothing done".
            raise failed(error, self.path, "sync_folder", folder) from error

    @contextmanager
    def _open_folder(self, folder: str) -> Iterator[int]:
        fd = self._fs.open(folder or ".", _FOLDER, dir_fd=self._root)
        try:
            yield fd
        finally:
            self._fs.close(fd)

    # looking

    def _open_file(self, name: str) -> tuple[int, int]:
        """Descriptor for reading and size; FileNotFoundError also for a folder, or where a file is above the name."""
        try:
            fd = self._fs.open(name, _READ, dir_fd=self._root)
        except NotADirectoryError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from error
        try:
            status = self._fs.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        except BaseException:
            self._fs.close(fd)
            raise
        return fd, status.st_size

    def _names_in(self, folder: str) -> Sequence[str]:
        """Names in the folder, in no order; none if there is no such folder."""
        try:
            with self._open_folder(folder) as fd:
                return self._fs.listdir(fd)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def _walk(self, folder: str, *, hidden: frozenset[str]) -> Iterator[tuple[str, os.stat_result]]:
        """Every regular file below the folder; `hidden` names of the zone's directory are left out."""
        folders = [folder]
        while folders:
            folder = folders.pop()
            for name in self._names_in(folder):
                if not folder and name in hidden:
                    continue
                path = f"{folder}/{name}" if folder else name
                try:
                    status = self._fs.stat(path, dir_fd=self._root, follow_symlinks=False)
                except FileNotFoundError:
                    continue  # removed since the listing
                if stat.S_ISDIR(status.st_mode):
                    folders.append(path)
                elif stat.S_ISREG(status.st_mode):
                    yield path, status

    def _disk_free_bytes(self) -> int:
        status = self._fs.fstatvfs(self._root)
        return status.f_bavail * status.f_frsize

    def _read_note(self, fd: int) -> str:
        return read_all(self._fs, fd, LOCK_NOTE_BYTES_MAX).decode(errors="replace").partition("\n")[0]

    # the rest

    def _clean_up(self) -> None:
        """Remove what a crash left half done. Only the holder of the lock may: to anyone else it may be in use."""
        for name in self._names_in(TMP_FOLDER):
            self._fs.unlink(f"{TMP_FOLDER}/{name}", dir_fd=self._root)
        self._spares.adopt(name for name in self._names_in(SPARE_FOLDER) if name != BALLAST_NAME)
        self._ballast.adopt()
        # Folders and names take space as well, where there is no second attempt.
        if self._disk_free_bytes() < self._ballast.size_bytes:
            self._ballast.drop()

    def _make_room(self, *, ballast: bool) -> bool:
        """Unlink the whole pool; if that was empty, the ballast. Whether there was anything."""
        with self._calls("make_room", ""):
            return self._spares.drop_all() or (ballast and self._ballast.drop())

    def _renew_ballast(self) -> None:
        if self._ballast.size_bytes and not self._ballast.is_there and self._lock_fd >= 0:
            try:
                self._make_durable_folder(TMP_FOLDER)
                self._make_durable_folder(SPARE_FOLDER)
            except OSError:
                return  # full already
            self._ballast.make(f"{TMP_FOLDER}/{next(self._tmp_numbers)}", self._disk_free_bytes())

    def _calls(self, call: str, name: str) -> translating:
        return translating(self.path, call, name)


class FileWriter(Writer):
    """A whole object on its way into a DirectoryBackend."""

    def __init__(self, backend: DirectoryBackend, name: str, tmp: str, fd: int) -> None:
        self._backend = backend
        self._fs = backend._fs
        self._name = name
        self._tmp = tmp
        self._fd = fd
        self._size_bytes = 0
        self._published = False

    def write(self, buffers: Sequence[memoryview | bytes]) -> None:
        views = [memoryview(buffer) for buffer in buffers]
        with self._backend._calls("write", self._name):
            while True:
                try:
                    length_bytes = self._write(views)
                    break
                except OSError as error:
                    if error.errno not in FULL_ERRNOS or not self._backend._make_room(ballast=True):
                        raise
            self._size_bytes += length_bytes

    def _write(self, views: Sequence[memoryview]) -> int:
        length_bytes = sum(view.nbytes for view in views)
        if length_bytes >= ALLOCATED_BYTES_MIN:
            try:
                self._fs.posix_fallocate(self._fd, self._size_bytes, length_bytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
        return write_all(self._fs, self._fd, views, self._size_bytes)

    def commit(self) -> None:
        with self._backend._calls("commit", self._name):
            self._finish()
            self._backend._rename(self._tmp, self._name)
            self._published = True

    def commit_new(self) -> None:
        """As commit, but Exists if the name is taken."""
        with self._backend._calls("commit_new", self._name):
            self._finish()
            self._backend._link(self._tmp, self._name)
            self._published = True

    def abort(self) -> None:
        with self._backend._calls("abort", self._name):
            self._close()
            if not self._published:
                self._published = True
                self._backend._unlink_leftover(self._tmp)

    def _finish(self) -> None:
        self._fs.fsync(self._fd)
        self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._fs.close(fd)


def _check_object_name(name: str) -> None:
    check_name(name)
    if name.partition("/")[0] in _OWN:
        raise InvalidRequest(f"the directory backend keeps this name for itself: name={name}")
