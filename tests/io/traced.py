# SPDX-License-Identifier: Apache-2.0
"""What a piece of work does to files, call by call, and the same work killed after each call.

The work runs in a forked child whose `os.fsync`, renames and removals are noted as they happen, with what the
synced file held at that moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Call(NamedTuple):
    """One call: "fsync", "rename", "link" (a link's rename) or "remove"; a synced file's digest, a rename's target."""

    kind: str
    path: str
    other: str
    thread: int  # that made the call: a writer of its own comes between the run's calls


def digest_of(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else "folder"


def traced(work: Callable[[], object], log: Path, die_after: int | None = None) -> list[Call]:
    """The calls of `work`, done in a child; with `die_after` the child kills itself after that many."""
    log.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)  # the parent's threads are not here
            _note_calls(log, die_after)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    died = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert died if die_after is not None else status == 0, f"the traced work ended with status {status}"
    return [Call(*json.loads(line)) for line in log.read_text().splitlines()]


def _note_calls(log: Path, die_after: int | None) -> None:
    """Wrap the calls of this process."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    count = 0

    def note(*call: str) -> None:
        nonlocal count
        os.write(out, (json.dumps([*call, threading.get_ident()]) + "\n").encode())
        count += 1
        if die_after is not None and count >= die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    real = {name: getattr(os, name) for name in ("fsync", "rename", "replace", "remove", "unlink", "rmdir")}

    def fsync(descriptor: Any) -> None:
        real["fsync"](descriptor)
        if stat.S_ISREG(os.fstat(descriptor).st_mode) or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            note("fsync", path, digest_of(path))

    def renaming(name: str) -> Callable[..., None]:
        def rename(source: Any, target: Any, **kwargs: Any) -> None:
            real[name](source, target, **kwargs)
            kind = "link" if os.path.islink(target) else "rename"  # a link holds nothing that could be synced
            note(kind, os.path.abspath(source), os.path.abspath(target))

        return rename

    def removing(name: str) -> Callable[..., None]:
        def remove(path: Any, *args: Any, **kwargs: Any) -> None:
            real[name](path, *args, **kwargs)
            if kwargs.get("dir_fd") is None:  # inside a folder that is being removed as a whole
                note("remove", os.path.abspath(path), "")

        return remove

    os.fsync = fsync
    for name in ("rename", "replace"):
        setattr(os, name, renaming(name))
    for name in ("remove", "unlink", "rmdir"):
        setattr(os, name, removing(name))


def check_order(calls: list[Call], folder: Path) -> list[str]:
    """See that each name in `folder` appeared in the right order; the names, as they appeared.

    Before a name is given: every file is synced with what it holds in the end, then the folder it lies in. After it:
    the folder that holds the name is synced before the same thread renames or removes anything else.
    """
    appeared = []
    for place, (kind, path, other, thread) in enumerate(calls):
        if kind != "rename" or Path(other).parent != folder or Path(other).name.startswith("."):
            continue
        synced = {c.path: c.other for c in calls[:place] if c.kind == "fsync"}
        inside = [p for p in synced if p == path or p.startswith(f"{path}/")]
        assert inside, f"{other} was renamed before it was synced"
        target = Path(other)
        if target.is_dir() and not target.is_symlink():
            assert synced.get(path) == "folder", f"the folder {other} was renamed before it was synced"
        for p in inside:
            now = target if p == path else target / Path(p).relative_to(path)
            newest = not any(c.kind == "rename" and c.other == other for c in calls[place + 1 :])
            if newest and now.is_file():
                assert synced[p] == digest_of(now), f"{now} was written to after its sync"
        following = [c for c in calls[place + 1 :] if c.thread == thread]
        until = next((i for i, c in enumerate(following) if c.kind != "fsync"), len(following))
        assert any(c.path == str(folder) for c in following[:until]), f"{folder} was not synced after {other} appeared"
        appeared.append(Path(other).name)
    return appeared


def removed(calls: list[Call], folder: Path) -> list[tuple[int, str]]:
    """Place in `calls` and name of everything in `folder` that lost its name for good."""
    found = []
    for place, (kind, path, other, _) in enumerate(calls):
        gone = kind == "remove" or (kind == "rename" and ".new-" in Path(other).name)
        if gone and Path(path).parent == folder and not Path(path).name.startswith("."):
            found.append((place, Path(path).name))
    return found
