"""Files that several processes may write: a reader finds all of the old content or of the new.

New content goes to a temporary with a unique name in the same folder, is flushed to the disk, and
takes the place of the old content by a rename (rename(2) replaces atomically); then the folder is
flushed, so that the rename survives a power failure too (Pillai et al. 2014, "All File Systems Are
Not Created Equal", section 2). A failure removes the temporary. A process that is killed leaves its
temporary behind, which the next holder of the lock removes.

A rename replaces a symbolic link at the path itself; the file that the link points to is never
written. A symbolic link to a folder is followed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

# -- Locks -------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Inside, no other process or thread holds the lock of this path.

    The lock is flock(2) on `<path>.lock`, so it ends with the process that holds it, even if that
    is killed. Every writer to the path holds the lock, so temporaries that exist when it is
    acquired belong to killed writers, and are removed. The lock is not re-entrant.

    Raises BlockingIOError, which names the path, if the lock is taken and `wait` is false; OSError
    if the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.parent.resolve() / f"{path.name}.lock"
    descriptor = _acquire(lock, path, wait)
    try:
        for left in path.parent.glob(f"{glob.escape(path.name)}.partial-*"):
            _remove(left)
        yield
    finally:
        # The file is removed while the lock is held; a waiting process then tries a new file.
        with contextlib.suppress(OSError):
            if _is_at(descriptor, lock):
                lock.unlink()
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child made by fork may have the file open too
        os.close(descriptor)


def _acquire(lock: Path, path: Path, wait: bool) -> int:
    """Opens and locks the lock file, and returns its descriptor."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_at(descriptor, lock):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise BlockingIOError(
                f"{path}: another run is writing to it; wait until that has ended, or choose "
                "another place"
            ) from None
        except BaseException as error:
            os.close(descriptor)
            if isinstance(error, OSError):
                error.filename = str(lock)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, lock: Path) -> bool:
    """Returns whether the open file is still the one that others find under this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(lock, follow_symlinks=False))
    except FileNotFoundError:
        return False


# -- Atomic replacement ------------------------------------------------------------------------


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to write, which replaces `path` at the end unless the body raises."""
    partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(8)}")
    file = open(partial, "xb")  # never an existing file, nor through a symbolic link
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Makes a directory to fill, which replaces `path` at the end unless the body raises.

    The old directory is removed before the new one is renamed; a kill between these two steps
    leaves no directory. The caller holds the lock.
    """
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.partial-", dir=path.parent) as around:
        made = Path(around) / path.name  # with the usual permissions, unlike `around`
        made.mkdir()
        yield made
        for folder, _, names in os.walk(made, topdown=False):
            for name in names:
                _sync(Path(folder) / name)
            _sync(Path(folder))
        shutil.rmtree(path, ignore_errors=True)
        made.rename(path)
        _sync(path.parent)


def write_text(path: Path, text: str) -> None:
    with new_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, document: Any) -> None:
    write_text(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _sync(path: Path) -> None:
    """Flushes a file, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems cannot fsync folders. PostgreSQL ignores the same two errors.
        if error.errno not in (errno.EBADF, errno.EINVAL):
            raise
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Removes a file or a folder, and ignores errors."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()
