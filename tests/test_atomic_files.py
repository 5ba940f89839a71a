import errno
import os
import signal

import pytest

from ncsn_diffusers import atomic_files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "report.json"
    atomic_files.write_text(path, "µ\n")
    assert path.read_bytes() == "µ\n".encode()
    with atomic_files.replacing(path) as aside:
        assert aside.parent == tmp_path and aside.suffix == ".json"  # by which Pillow, for one, chooses the format
        aside.write_text("new")
        assert path.read_text() == "µ\n"
    assert path.read_text() == "new"
    atomic_files.write_bytes(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["report.json"]


def test_a_failure_leaves_the_old_content_and_names_the_file(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(OSError, match=r"No space left on device: '.*/report\.json'"), atomic_files.replacing(path) as a:
        a.write_text("ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(KeyboardInterrupt), atomic_files.replacing(path) as aside:
        aside.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert names(tmp_path) == ["report.json"]
    with pytest.raises(OSError, match=r"nowhere/report\.json'$"):
        atomic_files.write_text(tmp_path / "nowhere" / "report.json", "new")


def test_a_killed_writer_leaves_the_old_content(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    child = os.fork()
    if not child:
        with atomic_files.replacing(path) as aside:
            aside.write_text("ne")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["incomplete-report.json", "report.json"]
    (tmp_path / "incomplete-folder" / "sub").mkdir(parents=True)
    atomic_files.remove_incomplete(tmp_path)
    assert names(tmp_path) == ["report.json"]


def test_content_and_then_name_reach_the_disk(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def watched_fsync(file):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}")))
        fsync(file)

    def watched_replace(source, target):
        events.append("rename")
        replace(source, target)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs Linux")
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    atomic_files.write_text(tmp_path / "a", "1")
    assert events == ["incomplete-a", "rename", tmp_path.name]
    events.clear()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").touch()
    atomic_files.sync_all(tmp_path)
    assert sorted(events) == sorted(["a", tmp_path.name, "b", "sub"])
