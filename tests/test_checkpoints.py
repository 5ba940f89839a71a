import json

import pytest

from ncsn_diffusers.checkpoints import (
    aside,
    complete,
    is_complete,
    latest_checkpoint,
    read_manifest,
    remove_all,
    remove_incomplete,
)


def write(folder, step, total_limit=10):
    aside(folder, step).mkdir(parents=True)
    (aside(folder, step) / "weights").write_bytes(b"w" * 100)
    (aside(folder, step) / "state").write_bytes(b"s" * 10)
    complete(folder, step, {"step": step}, total_limit)
    return folder / f"checkpoint-{step}"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_latest_counts_in_numbers(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (900, 1000, 20):
        write(tmp_path, step)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1000"
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
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_what_is_not_renamed_does_not_count(tmp_path):
    write(tmp_path, 1)
    aside(tmp_path, 2).mkdir()
    (aside(tmp_path, 2) / "weights").write_bytes(b"w")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    remove_incomplete(tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]


def test_limit_keeps_the_last_good_ones(tmp_path):
    for step in range(1, 5):
        write(tmp_path, step, total_limit=2)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    for step in (3, 4):
        (tmp_path / f"checkpoint-{step}" / "state").unlink()
    write(tmp_path, 5, total_limit=1)  # what is broken does not count, and is left to whoever may mend it
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-5"


def test_a_step_taken_again_replaces_its_checkpoint(tmp_path):
    (write(tmp_path, 1) / "mark").touch()
    assert not (write(tmp_path, 1) / "mark").exists()


def test_remove_all_leaves_the_rest(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "checkpoint-notes").mkdir()
    remove_all(tmp_path)
    assert names(tmp_path) == ["checkpoint-notes"]
