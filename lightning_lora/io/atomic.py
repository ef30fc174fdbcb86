# SPDX-License-Identifier: Apache-2.0
"""Files and folders that appear whole or not at all.

A file is written beside its target, flushed, synced and renamed over it; a folder is filled under a hidden
name beside its target and renamed into place::

    .name.new-<host>-<pid>-<run>-<hex>   being filled          -> synced, renamed to  name
    .name.old-<host>-<pid>-<run>-<hex>   the one it replaces   -> removed when the new one stands and is synced

A process killed between the two renames of a replacement leaves the old folder whole under its hidden name;
`recover` (which `atomic_folder` and the readers of folders call) puts it back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from lightning_lora.errors import CheckpointError, WriteError

_NEW, _OLD = "new", "old"
_TRIES = 100  # at putting a folder in place while others do
_ROOM = "Make room there or choose another disk, and save again"
_PERMISSION = "Give this user write permission there, or choose another folder"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _PERMISSION),
    errno.EIO: "The disk is failing: choose another one",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ENOTDIR: "A part of the path is a file: choose another path",
}
_RUN = secrets.token_hex(4)  # a restarted container often has the process id of the one that was killed


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str], over_folder: bool = False) -> Iterator[Path]:
    """Give a path to write to; on leaving without an exception what was written there becomes `path`.

    The order is: write, sync of the file, rename, sync of the folder.

    Args:
        path: The file to write. Its folder is made when it is missing.
        over_folder: Whether a folder that stands at `path` is replaced: it is moved aside when the file is written
            and removed when that is in place.

    Yields:
        A hidden path beside the target. Whoever opens it closes it before the block ends.

    Raises:
        CheckpointError: When the block wrote nothing, or a folder stands at `path` that is not to be replaced.
        WriteError: When there is no room or no permission.
    """
    target = Path(path)
    part = _hidden(target, _NEW)
    with _telling(target):
        if target.is_dir() and not over_folder:
            raise CheckpointError(
                f"a file is to be written to {target}, but a folder stands there: move it or choose another path."
            )
        _make_folder(target.parent)
        clean_leftovers(target.parent)
        try:
            yield part
            if not part.exists():
                raise CheckpointError(f"nothing was written for {target}: write to the path that the block was given.")
            _sync(part)
            if over_folder:
                _swap(part, target)
            else:
                os.replace(part, target)
                _sync(target.parent)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], over_file: bool = False) -> Iterator[Path]:
    """Give an empty folder to fill; on leaving without an exception it becomes `path`, as a whole.

    A folder that already stands at `path` is moved aside first and removed when the new one is in place, so
    that a whole old or a whole new one is found at any moment.

    Args:
        path: The folder to write. Its parent is made when it is missing.
        over_file: Whether a file that stands at `path` is replaced like a folder.

    Yields:
        The hidden folder to fill.

    Raises:
        CheckpointError: When a file stands at `path`, and it is not to be replaced.
        WriteError: When there is no room or no permission.
    """
    target = Path(path)
    if _is_file(target) and not over_file:
        raise CheckpointError(
            f"a folder is to be written to {target}, but a file stands there: move it or choose another path."
        )
    with _telling(target):
        _make_folder(target.parent)
        recover(target)
        clean_leftovers(target.parent)
        part = _hidden(target, _NEW)
        part.mkdir()
        try:
            yield part
            _share(part)
            sync_folder(part)
            _swap(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def atomic_link(path: str | os.PathLike[str], to: str | os.PathLike[str]) -> None:
    """Make `path` a symbolic link to `to`, in place of the link, file or folder that stands there.

    Args:
        path: The link. Its folder is there.
        to: What it points to, written relative to the link's folder.
    """
    target = Path(path)
    part = _hidden(target, _NEW)
    with _telling(target):
        os.symlink(os.path.relpath(to, target.parent), part)
        try:
            _swap(part, target)
        finally:
            part.unlink(missing_ok=True)


def remove_folder(path: str | os.PathLike[str]) -> Path | None:
    """Remove a folder so that it is gone at once: it is renamed to a hidden name first, then deleted.

    A symbolic link is removed without touching what it points to. A missing folder is no error.

    Args:
        path: The folder to remove.

    Returns:
        The hidden name under which files are left that could not be deleted; None where all are gone.
    """
    target = Path(path)
    if target.is_symlink():
        target.unlink()
        return None
    if not target.exists():
        return None
    aside = _hidden(target, _NEW)  # "new": a leftover of a removal is rubbish, never a folder to recover
    os.replace(target, aside)
    shutil.rmtree(aside, ignore_errors=True)
    return aside if aside.exists() else None


def recover(path: str | os.PathLike[str]) -> bool:
    """Put back the folder that a killed process had moved aside when nothing stands at `path`.

    Where the process is alive after all, or on another machine, it finds the folder put back and moves it aside
    once more.

    Args:
        path: The folder as its readers know it.

    Returns:
        Whether a folder was put back.
    """
    target = Path(path)
    if os.path.lexists(target) or not target.parent.is_dir():
        return False
    asides = [(p, _writer(p.name, _OLD)) for p in target.parent.iterdir()]
    whole = [p for p, writer in asides if writer and writer.target == target.name]
    try:
        os.rename(max(whole, key=lambda p: p.lstat().st_mtime_ns), target)
    except (OSError, ValueError):  # another process put one back first, or there is none
        return False
    _sync(target.parent)
    return True


def clean_leftovers(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove what killed processes of this machine left half written in a folder.

    Folders of another machine on a shared disk, and those of living processes, are left alone; a replaced
    folder is removed only when the one that replaces it stands.

    Args:
        folder: Where targets are written.

    Returns:
        The paths that were removed.
    """
    removed = []
    for entry in list(Path(folder).iterdir()):
        rubbish = _writer(entry.name, _NEW)
        replaced = _writer(entry.name, _OLD)
        if replaced is not None and (entry.parent / replaced.target).exists():
            rubbish = replaced
        if rubbish is None or _is_alive(rubbish):
            continue
        _remove(entry)
        removed.append(entry)
    return removed


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Flush every file and folder below `folder` to the disk, the folder itself last.

    Args:
        folder: The root of what is flushed.
    """
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            if not os.path.islink(os.path.join(root, name)):
                _sync(Path(root, name))
        _sync(Path(root))


def _share(folder: Path) -> None:
    """Give files the permissions of any other file of this process; safetensors writes for the owner alone."""
    mode = folder.stat().st_mode & 0o666  # the folder was made with the process's own mask
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if not path.is_symlink():
                path.chmod(mode)


def _swap(part: Path, target: Path) -> None:
    """Rename `part` to `target`; what stood there is moved aside before and removed after.

    Another process that writes the same folder may put its own there in between: then that is moved aside too.
    """
    asides: list[Path] = []
    for _ in range(_TRIES):
        try:
            if _is_in_the_way(part, target):
                aside = _hidden(target, _OLD)
                os.rename(target, aside)
                asides.append(aside)
            os.rename(part, target)
            break
        except FileNotFoundError:
            if not os.path.lexists(part):
                raise
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
                recover(target)
                raise
        except BaseException:
            recover(target)
            raise
    else:
        raise CheckpointError(f"{target} could not be put in place: other processes write the same folder all the time")
    _sync(target.parent)
    for aside in asides:
        rubbish = _hidden(target, _NEW)  # from here on it is no folder to recover
        with contextlib.suppress(OSError):
            os.rename(aside, rubbish)
            _remove(rubbish)


def _is_file(target: Path) -> bool:
    """Whether something stands there that is no folder, by one look: another process may move it aside between two."""
    try:
        return not stat.S_ISDIR(target.stat().st_mode)
    except OSError:
        return False


def _is_in_the_way(part: Path, target: Path) -> bool:
    """Whether no rename can replace the target: a folder, or anything by a folder."""
    if target.is_symlink():
        return not part.is_symlink()
    return target.is_dir() or (target.exists() and part.is_dir())


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder; one that cannot be removed is left."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents; each new name is synced too."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        _sync(made.parent)


@contextlib.contextmanager
def _telling(target: Path) -> Iterator[None]:
    """Say which file could not be written, and what to do."""
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        elsewhere = isinstance(error, OSError) and error.filename and str(target.parent) not in str(error.filename)
        if number not in _REMEDIES or elsewhere:
            raise
        told = WriteError(
            f"{target} could not be written: {os.strerror(number)}. What stood there before is as it was. "
            f"{_REMEDIES[number]}"
        )
        told.errno = number
        raise told from error


def _error_number(error: BaseException) -> int:
    """The system's error behind what was raised; 0 where there is none."""
    if isinstance(error, WriteError):
        return 0
    if isinstance(error, OSError):
        return error.errno or 0
    if isinstance(error, SafetensorError):
        found = re.search(r"\(os error (\d+)\)", str(error))
        return int(found[1]) if found else 0
    behind = error.__cause__ or error.__context__
    if type(error) is RuntimeError and isinstance(behind, OSError):  # torch's writer
        return behind.errno or 0
    return 0


def _sync(path: Path) -> None:
    """Flush a file or a folder; a file system that cannot sync folders is let pass."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _host() -> str:
    """This machine's name, safe inside a file name and without the separator."""
    return re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname()) or "host"


def _hidden(target: Path, kind: str) -> Path:
    """A fresh hidden name beside `target` that says who writes it."""
    return target.parent / f".{target.name}.{kind}-{_host()}-{os.getpid()}-{_RUN}-{secrets.token_hex(4)}"


class _Writer(NamedTuple):
    """Who writes under a hidden name of ours."""

    target: str
    host: str
    pid: int
    run: str


def _writer(name: str, kind: str) -> _Writer | None:
    """The writer of a hidden name of ours, None for any other name."""
    match = re.fullmatch(rf"\.(.+)\.{kind}-([A-Za-z0-9_]+)-(\d+)-([0-9a-f]{{8}})-[0-9a-f]{{8}}", name)
    if match is None:
        return None
    return _Writer(match.group(1), match.group(2), int(match.group(3)), match.group(4))


def _is_alive(writer: _Writer) -> bool:
    """Whether the writer may still be at work: a living process here, or any process elsewhere."""
    if writer.host != _host():
        return True
    if writer.pid == os.getpid():
        return writer.run == _RUN
    try:
        os.kill(writer.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
