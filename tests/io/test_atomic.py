# SPDX-License-Identifier: Apache-2.0
"""A killed process leaves the old or the new, whole; an exception leaves the old."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_lora.errors import CheckpointError
from lightning_lora.io.atomic import (
    _hidden,
    atomic_folder,
    atomic_write,
    clean_leftovers,
    recover,
    remove_folder,
)


def forked(work: Callable[[], object]) -> int:
    """Start a child process that does `work`; its id. No new interpreter: importing one takes seconds."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def killed_at(point: str, target: Path) -> None:
    """Let a child begin a write and kill itself at a point of it."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        if point == "in_file":
            with atomic_write(target) as part:
                part.write_text("ne")
                die()
        if point == "in_folder":
            with atomic_folder(target) as part:
                (part / "a").write_text("new")
                die()
        aside = _hidden(target, "old")
        os.rename(target, aside)
        if point == "between_renames":  # the one moment at which the name stands for nothing
            die()
        target.mkdir()
        (target / "a").write_text("new")
        die()

    _, status = os.waitpid(forked(work), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def old_folder(target: Path) -> Path:
    with atomic_folder(target) as part:
        (part / "a").write_text("old")
    return target


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_atomic_write_makes_the_folder_and_the_file(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "deep" / "f.txt") as part:
        part.write_text("new")
        assert not (tmp_path / "deep" / "f.txt").exists()
    assert (tmp_path / "deep" / "f.txt").read_text() == "new"
    assert hidden(tmp_path / "deep") == []


def test_atomic_write_on_an_exception_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "f.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="half way"), atomic_write(target) as part:
        part.write_text("ne")
        raise RuntimeError("half way")
    assert target.read_text() == "old"
    assert hidden(tmp_path) == []


def test_atomic_write_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing was written for .*f.txt"), atomic_write(tmp_path / "f.txt"):
        pass


def test_atomic_folder_replaces_as_a_whole(tmp_path: Path) -> None:
    target = old_folder(tmp_path / "d")
    (target / "only_in_old").write_text("x")
    with atomic_folder(target) as part:
        (part / "sub").mkdir()
        (part / "sub" / "a").write_text("new")
        assert (target / "a").read_text() == "old"
    assert sorted(p.name for p in target.iterdir()) == ["sub"]
    assert hidden(tmp_path) == []


def test_atomic_folder_on_an_exception_keeps_the_old_folder(tmp_path: Path) -> None:
    target = old_folder(tmp_path / "d")
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as part:
        (part / "a").write_text("new")
        raise KeyboardInterrupt
    assert (target / "a").read_text() == "old"
    assert hidden(tmp_path) == []


def test_atomic_folder_where_a_file_stands_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "d").write_text("a file")
    with pytest.raises(CheckpointError, match="a file stands there"), atomic_folder(tmp_path / "d"):
        pass
    assert (tmp_path / "d").read_text() == "a file"


def test_atomic_folder_over_a_link_replaces_the_link_only(tmp_path: Path) -> None:
    old_folder(tmp_path / "d")
    (tmp_path / "link").symlink_to("d")
    with atomic_folder(tmp_path / "link") as part:
        (part / "a").write_text("new")
    assert (tmp_path / "d" / "a").read_text() == "old"
    assert (tmp_path / "link" / "a").read_text() == "new"
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("point", ["in_file", "in_folder"])
def test_a_kill_while_writing_leaves_the_old_and_the_next_write_cleans_up(tmp_path: Path, point: str) -> None:
    target = tmp_path / "t"
    if point == "in_file":
        target.write_text("old")
    else:
        old_folder(target)
    killed_at(point, target)
    assert (target if point == "in_file" else target / "a").read_text() == "old"
    assert len(hidden(tmp_path)) == 1
    with atomic_write(tmp_path / "other") as part:
        part.write_text("x")
    assert hidden(tmp_path) == []


def test_a_kill_between_the_renames_leaves_the_old_folder_recoverable(tmp_path: Path) -> None:
    target = old_folder(tmp_path / "t")
    killed_at("between_renames", target)
    assert not target.exists()
    clean_leftovers(tmp_path)  # does not take the only whole one
    assert recover(target)
    assert (target / "a").read_text() == "old"
    assert not recover(target)


def test_a_kill_between_the_renames_then_a_failed_write_keeps_the_old_folder(tmp_path: Path) -> None:
    target = old_folder(tmp_path / "t")
    killed_at("between_renames", target)
    with pytest.raises(RuntimeError), atomic_folder(target):
        raise RuntimeError
    assert (target / "a").read_text() == "old"


def test_a_kill_before_the_removal_leaves_the_new_folder_and_rubbish_that_goes(tmp_path: Path) -> None:
    target = old_folder(tmp_path / "t")
    killed_at("before_removal", target)
    assert (target / "a").read_text() == "new"
    assert len(clean_leftovers(tmp_path)) == 1
    assert hidden(tmp_path) == []


def test_a_kill_at_any_moment_leaves_a_whole_folder(tmp_path: Path) -> None:
    target = tmp_path / "t"

    def write_for_ever() -> None:
        for i in range(10**9):
            with atomic_folder(target) as part:
                for name in "ab":
                    (part / name).write_text(str(i) * 1000)

    for delay in (0.02, 0.023, 0.031, 0.04, 0.047):
        pid = forked(write_for_ever)
        while not target.exists():
            time.sleep(0.001)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        recover(target)
        a, b = (target / "a").read_text(), (target / "b").read_text()
        assert a == b
        assert len(a) % 1000 == 0


def test_leftovers_of_living_processes_and_other_machines_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".x.new-elsewhere-1-00000000-00000000").mkdir()
    with atomic_folder(tmp_path / "t") as mine:
        assert clean_leftovers(tmp_path) == []
        assert mine.exists()
    assert hidden(tmp_path) == [".x.new-elsewhere-1-00000000-00000000"]


def test_a_leftover_of_an_earlier_process_with_our_id_is_removed(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "t") as mine:
        host = mine.name.split("-")[1]
    (tmp_path / f".x.new-{host}-{os.getpid()}-00000000-00000000").write_text("half")
    assert len(clean_leftovers(tmp_path)) == 1


def test_remove_folder_takes_a_folder_a_link_or_nothing(tmp_path: Path) -> None:
    old_folder(tmp_path / "d")
    (tmp_path / "link").symlink_to("d")
    remove_folder(tmp_path / "link")
    assert (tmp_path / "d" / "a").exists()
    remove_folder(tmp_path / "d")
    remove_folder(tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_folder_are_readable_like_any_other_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    with atomic_folder(tmp_path / "out") as part:
        (part / "inner").mkdir()
        for path in (part / "private", part / "inner" / "private"):
            path.touch(mode=0o600)
    expected = (tmp_path / "ordinary").stat().st_mode
    assert (tmp_path / "out" / "private").stat().st_mode == expected
    assert (tmp_path / "out" / "inner" / "private").stat().st_mode == expected
