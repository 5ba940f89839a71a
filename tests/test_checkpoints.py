import errno
import json
import os
import signal
import sys

import pytest

from ncsn_diffusers import atomic_files
from ncsn_diffusers.training import checkpoints
from ncsn_diffusers.training.checkpoints import (
    begin,
    check_unlocked,
    commit,
    is_complete,
    latest,
    lock,
    read_manifest,
    remove_all,
)


def write(folder, step, total_limit=10):
    path = begin(folder, step)
    (path / "weights").write_bytes(b"w" * 100)
    (path / "state").write_bytes(b"s" * 10)
    return commit(path, {"step": step}, total_limit)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_latest_counts_in_numbers(tmp_path):
    assert latest(tmp_path) is None
    for step in (20, 900, 1000):
        assert write(tmp_path, step) == tmp_path / f"checkpoint-{step}"
    assert names(tmp_path) == ["checkpoint-1000", "checkpoint-20", "checkpoint-900"]
    assert latest(tmp_path) == tmp_path / "checkpoint-1000"
    assert read_manifest(tmp_path / "checkpoint-1000") == {"step": 1000, "files": {"state": 10, "weights": 100}}


@pytest.mark.parametrize("damage", ["truncated file", "missing file", "no manifest", "cut manifest"])
def test_latest_passes_over_what_was_cut_short(tmp_path, damage):
    write(tmp_path, 1)
    broken = write(tmp_path, 2)
    if damage == "truncated file":
        (broken / "weights").write_bytes(b"w" * 99)
    elif damage == "missing file":
        (broken / "state").unlink()
    elif damage == "no manifest":
        (broken / "manifest.json").unlink()
    else:
        (broken / "manifest.json").write_text(json.dumps({"step": 2})[:-1])
    assert not is_complete(broken)
    assert latest(tmp_path) == tmp_path / "checkpoint-1"


def test_what_is_not_committed_does_not_count(tmp_path):
    write(tmp_path, 1)
    (begin(tmp_path, 2) / "weights").write_bytes(b"w")
    (begin(tmp_path, 2) / "state").write_bytes(b"s")  # another process begins it, too
    assert names(tmp_path / "incomplete-checkpoint-2") == ["state", "weights"]
    assert latest(tmp_path) == tmp_path / "checkpoint-1"
    atomic_files.remove_incomplete(tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]


def test_limit_keeps_the_last_good_ones(tmp_path):
    for step in range(1, 5):
        write(tmp_path, step, total_limit=2)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    (tmp_path / "checkpoint-4" / "state").unlink()
    write(tmp_path, 5, total_limit=2)  # what is broken does not count, and goes when it would be beyond the limit
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
    write(tmp_path, 6, total_limit=2)
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-6"]


# Calls that change what is on the disk
CHANGES = ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def killed_in(folder, number, function):
    """Run a function in a process that is killed at its `number`th change of the folder; whether it was."""
    child = os.fork()
    if not child:
        left = [number]

        def watch(event, arguments):
            if event in CHANGES:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("case", ["the oldest goes", "the later go", "the same step"])
def test_killed_while_it_commits(tmp_path, case):
    """Whatever is half deleted then neither counts nor stays beyond the next commit."""
    steps, step = {"the oldest goes": ((1, 2), 3), "the later go": ((2, 4, 5), 3), "the same step": ((2, 3), 3)}[case]
    number = 0
    while True:
        number += 1
        folder = tmp_path / str(number)
        for before in steps:
            write(folder, before)
        (folder / f"checkpoint-{steps[-1]}" / "of the old run").touch()
        if not killed_in(folder, number, lambda folder=folder: write(folder, step, total_limit=2)):
            break
        found = list(folder.glob("checkpoint-*"))
        assert all(is_complete(path) for path in found)
        expected = {f"checkpoint-{before}" for before in steps if before <= step} | {f"checkpoint-{step}"}
        if latest(folder).name == f"checkpoint-{step}" and not (latest(folder) / "of the old run").exists():
            assert {path.name for path in found} <= expected  # the new one has its name: no later one has
        write(folder, step + 1, total_limit=2)
        assert set(names(folder)) <= {f"checkpoint-{s}" for s in (*steps, step, step + 1) if s <= step + 1}
        assert latest(folder).name == f"checkpoint-{step + 1}" and len(names(folder)) <= 2
    assert number > 4


def test_a_step_taken_again_replaces_its_checkpoint(tmp_path):
    (write(tmp_path, 1) / "mark").touch()
    assert not (write(tmp_path, 1) / "mark").exists()


@pytest.mark.parametrize("total_limit", [1, 3])
def test_checkpoints_that_were_given_up_do_not_come_back(tmp_path, total_limit):
    """A run that went on from step 500 once more is at 700."""
    for step in (500, 1000, 1500):
        write(tmp_path, step)
    assert write(tmp_path, 700, total_limit) == latest(tmp_path)
    assert names(tmp_path) == ["checkpoint-500", "checkpoint-700"][-total_limit:]


def test_remove_all_leaves_the_rest(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "checkpoint-notes").mkdir()
    remove_all(tmp_path)
    assert names(tmp_path) == ["checkpoint-notes"]


def lock_in_a_child(folder, function=lock):
    """What a lock in another process comes to, by its exit status."""
    child = os.fork()
    if not child:
        try:
            function(folder)
        except BlockingIOError as error:
            os._exit(1 if f"Another run is using {folder}" in str(error) else 2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(checkpoints.fcntl is None, reason="Windows has no such locks")
def test_lock(tmp_path):
    check_unlocked(tmp_path)
    assert names(tmp_path) == []
    file = lock(tmp_path)
    assert lock_in_a_child(tmp_path) == 1
    assert lock_in_a_child(tmp_path, check_unlocked) == 1
    file.close()
    assert lock_in_a_child(tmp_path, check_unlocked) == 0
    assert lock_in_a_child(tmp_path) == 0
    assert lock_in_a_child(tmp_path) == 0  # released by the death of the first


def test_a_folder_that_cannot_be_locked_is_told_of(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if checkpoints.fcntl is not None:
        monkeypatch.setattr(checkpoints.fcntl, "lockf", unsupported)
        with pytest.warns(UserWarning, match=r"cannot be locked \(.*No locks available\): start no second run on it"):
            lock(tmp_path).close()
    monkeypatch.setattr(checkpoints, "fcntl", None)
    with pytest.warns(UserWarning, match="cannot be locked on this system"):
        lock(tmp_path).close()
