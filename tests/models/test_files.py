"""Tests locks and replaced files with killed processes, failing writes and links in the way."""

import errno
import multiprocessing
import multiprocessing.dummy
import os
import signal
import stat
from pathlib import Path

import pytest

from fused_attention.models import files

FORK = multiprocessing.get_context("fork")  # a new interpreter would import torch for seconds
PATIENCE = 100  # seconds to wait for what should happen at once
both_kinds = pytest.mark.parametrize(
    "kind", [FORK, multiprocessing.dummy], ids=["processes", "threads"]
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.join(PATIENCE)


# -- Locks -------------------------------------------------------------------------------------


@both_kinds
def test_who_does_not_wait_for_a_lock_is_refused(tmp_path, kind):
    held, go = kind.Event(), kind.Event()

    def hold():
        with files.locked(tmp_path / "x"):
            held.set()
            go.wait(PATIENCE)

    holder = kind.Process(target=hold)
    holder.start()
    assert held.wait(PATIENCE)
    with pytest.raises(BlockingIOError, match=f"{tmp_path}/x: another run is writing to it; wait"):
        with files.locked(tmp_path / "x", wait=False):
            raise AssertionError
    with files.locked(tmp_path / "y", wait=False):
        pass
    go.set()
    holder.join(PATIENCE)
    with files.locked(tmp_path / "x", wait=False):
        pass
    assert names(tmp_path) == []


@both_kinds
def test_a_lock_excludes_the_others(tmp_path, kind):
    """A counter that is read and written in two steps loses no increment."""
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count():
        for _ in range(20):
            with files.locked(counter):
                value = int(counter.read_text())
                counter.write_text(str(value + 1))

    others = [kind.Process(target=count) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join(PATIENCE)
    assert counter.read_text() == "60"
    assert names(tmp_path) == ["counter"]


def test_a_lock_ends_with_its_process(tmp_path):
    held, never = FORK.Event(), FORK.Event()

    def hold():
        with files.locked(tmp_path / "x"):
            held.set()
            never.wait(PATIENCE)

    holder = FORK.Process(target=hold)
    holder.start()
    assert held.wait(PATIENCE)
    kill(holder)
    assert names(tmp_path) == ["x.lock"]
    with files.locked(tmp_path / "x", wait=False):
        pass
    assert names(tmp_path) == []


def test_a_child_of_its_process_does_not_keep_a_lock(tmp_path):
    """The child has the lock file open, like a worker that is forked in the middle of a run."""
    go = FORK.Event()
    child = FORK.Process(target=go.wait, args=(PATIENCE,))
    with files.locked(tmp_path / "x"):
        child.start()
        os.link(tmp_path / "x.lock", tmp_path / "same")
    (tmp_path / "same").rename(tmp_path / "x.lock")  # else the next lock would have a new file
    with files.locked(tmp_path / "x", wait=False):
        pass
    go.set()
    child.join(PATIENCE)


def test_a_lock_ends_with_an_exception(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), files.locked(tmp_path / "x", wait=False):
            raise ZeroDivisionError


def test_a_lock_file_that_was_removed_excludes_nobody_from_a_new_one(tmp_path):
    """The first holder leaves the new lock file of another process alone."""
    with files.locked(tmp_path / "x", wait=False):
        (tmp_path / "x.lock").unlink()
        with files.locked(tmp_path / "x", wait=False):
            (tmp_path / "x.lock").rename(tmp_path / "aside")
            (tmp_path / "x.lock").touch()
        assert names(tmp_path) == ["aside", "x.lock"]


def test_a_lock_under_a_link_to_the_folder_is_the_same(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with files.locked(tmp_path / "real" / "x"):
        with pytest.raises(BlockingIOError), files.locked(tmp_path / "link" / "x", wait=False):
            raise AssertionError


def test_a_lock_is_released_where_it_was_taken(tmp_path, monkeypatch):
    """The lock is released even if the process has changed its directory since."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    with files.locked(Path("x")):
        monkeypatch.chdir(tmp_path / "b")
    assert names(tmp_path / "a") == names(tmp_path / "b") == []


def test_without_locks_in_the_file_system_the_file_is_named(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No locks available: '.*/x.lock'"):
        with files.locked(tmp_path / "x"):
            raise AssertionError
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "x.lock").symlink_to("elsewhere")
    with pytest.raises(OSError, match="x.lock"), files.locked(tmp_path / "x"):
        raise AssertionError
    assert names(tmp_path) == ["x.lock"]


# -- Files -------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "x"
    files.write_text(path, "old ä")
    assert path.read_bytes() == "old ä".encode()
    with pytest.raises(ZeroDivisionError), files.new_file(path) as file:
        file.write(b"ne")
        file.flush()
        assert path.read_bytes() == "old ä".encode()
        raise ZeroDivisionError
    assert path.read_bytes() == "old ä".encode() and names(tmp_path) == ["x"]
    files.write_json(path, {"ä": 1})
    assert path.read_text("utf-8") == '{\n "ä": 1\n}\n'
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_kill_while_writing_leaves_the_old_file_and_the_next_writer_tidies_up(tmp_path):
    path, half, never = tmp_path / "x", FORK.Event(), FORK.Event()
    path.write_text("old")

    def write():
        with files.locked(path), files.new_file(path) as file:
            file.write(b"ne")
            file.flush()
            half.set()
            never.wait(PATIENCE)

    writer = FORK.Process(target=write)
    writer.start()
    assert half.wait(PATIENCE)
    kill(writer)
    assert path.read_text() == "old"
    assert len(names(tmp_path)) == 3  # x, its lock and the temporary file
    (tmp_path / "x.partial-directory" / "more").mkdir(parents=True)
    (tmp_path / "another.partial-1").touch()
    with files.locked(path):
        assert names(tmp_path) == ["another.partial-1", "x", "x.lock"]
        files.write_text(path, "new")
    assert path.read_text() == "new"


def test_a_temporary_is_unique_and_never_a_link(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("victim")
    with files.new_file(tmp_path / "x") as first, files.new_file(tmp_path / "x") as second:
        assert first.name != second.name
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "known")
    (tmp_path / "x.partial-known").symlink_to(victim)
    with pytest.raises(FileExistsError):
        files.write_text(tmp_path / "x", "new")
    assert victim.read_text() == "victim" and (tmp_path / "x.partial-known").is_symlink()


def test_a_link_is_replaced_and_a_linked_folder_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "y").write_text("old")
    (tmp_path / "x").symlink_to("real/y")
    files.write_text(tmp_path / "x", "new")
    assert (tmp_path / "real" / "y").read_text() == "old"
    assert (tmp_path / "x").read_text() == "new" and not (tmp_path / "x").is_symlink()
    (tmp_path / "link").symlink_to("real")
    files.write_text(tmp_path / "link" / "y", "new")
    assert (tmp_path / "real" / "y").read_text() == "new"


# -- Directories -------------------------------------------------------------------------------


def test_a_directory_is_replaced_whole(tmp_path):
    path = tmp_path / "x"
    for content in ("old", "new"):
        with files.new_directory(path) as made:
            (made / content).touch()
            assert names(path) == ["old"] if content == "new" else not path.exists()
        assert names(path) == [content]
    with pytest.raises(ZeroDivisionError), files.new_directory(path) as made:
        raise ZeroDivisionError
    assert names(path) == ["new"] and names(tmp_path) == ["x"]


# -- The disk ----------------------------------------------------------------------------------


@pytest.fixture
def events(monkeypatch):
    """Records what is flushed and renamed, in order: ("flush" | "rename", name)."""
    seen = []

    def record(module, function, note):
        original = getattr(module, function)

        def recorded(*arguments, **options):
            seen.append(note(*arguments))
            return original(*arguments, **options)

        monkeypatch.setattr(module, function, recorded)

    def name(descriptor):
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    record(files.os, "fsync", lambda descriptor: ("flush", name(descriptor).split(".partial")[0]))
    record(files.os, "replace", lambda source, target: ("rename", target.name))
    record(files.Path, "rename", lambda source, target: ("rename", target.name))
    return seen


def test_content_is_flushed_before_the_rename_and_the_folder_after_it(tmp_path, events):
    folder = tmp_path / "folder"
    folder.mkdir()
    files.write_text(folder / "x", "text")
    assert events == [("flush", "x"), ("rename", "x"), ("flush", "folder")]
    events.clear()
    with files.new_directory(folder / "d") as made:
        (made / "more").mkdir()
        (made / "more" / "a").touch()
        (made / "b").touch()
    contents = [("flush", "a"), ("flush", "more"), ("flush", "b"), ("flush", "d")]
    assert events == [*contents, ("rename", "d"), ("flush", "folder")]


@pytest.mark.parametrize("number, raises", [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_flushed(tmp_path, monkeypatch, number, raises):
    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", fsync)
    try:
        files.write_text(tmp_path / "x", "text")
    except OSError as error:
        assert raises and error.errno == number
    else:
        assert not raises
    assert (tmp_path / "x").read_text() == "text"
