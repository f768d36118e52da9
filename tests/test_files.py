"""Atomic writes: whole or not at all, nothing left behind, nobody else's files touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import listing

from toolchain.errors import InputError
from toolchain.files import inside, replace_folder, write_atomic


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "a", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "new" / "folder" / "b", "new")
    assert listing(tmp_path) == {"a"}


def test_a_file_is_written_beside_and_then_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a reader, or kill -9, finds the old bytes or the new ones, never some of each."""
    write_atomic(tmp_path / "a", "old")

    def killed(source: Path, target: Path) -> None:
        assert Path(source).read_text() == "new"
        assert Path(source).parent == Path(target).parent
        assert (tmp_path / "a").read_text() == "old"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a", "new")
    assert listing(tmp_path) == {"a"}
    assert (tmp_path / "a").read_text() == "old"


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "x" / "y" / "package"

    def fail() -> None:
        with replace_folder(target, "mark") as folder:
            (folder / "mark").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert listing(tmp_path) == set()
    with replace_folder(target, "mark") as folder:
        (folder / "mark").write_text("1")
    assert listing(target) == {"mark"}
    with pytest.raises(RuntimeError):
        fail()
    assert (target / "mark").read_text() == "1"
    with replace_folder(target, "mark") as folder:
        (folder / "mark").write_text("2")
    assert (target / "mark").read_text() == "2"
    assert listing(target.parent) == {"package", "package/mark"}


def test_an_empty_folder_is_replaced_and_anything_else_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with replace_folder(tmp_path / "empty", "mark") as folder:
        (folder / "mark").touch()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis").write_text("mine")
    before = listing(tmp_path)
    for name in ("file", "full"):
        with pytest.raises(InputError, match="something else"), replace_folder(tmp_path / name, "mark"):
            pytest.fail("entered")
    assert listing(tmp_path) == before


def test_leftovers_of_killed_runs_are_swept_and_a_neighbours_are_not(tmp_path: Path) -> None:
    """A folder that another export is filling now, for a target whose name begins with ours, must live."""
    for name in (".a.0123abcd.tmp", ".a.b.0123abcd.tmp", ".a[1].0123abcd.tmp", ".a.notes.tmp", "a.0123abcd.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with replace_folder(tmp_path / "a", "mark") as folder:
        (folder / "mark").touch()
    assert {path.name for path in tmp_path.iterdir()} == {
        "a",
        ".a.b.0123abcd.tmp",
        ".a[1].0123abcd.tmp",
        ".a.notes.tmp",
        "a.0123abcd.tmp",
    }
    with replace_folder(tmp_path / "a[1]", "mark") as folder:
        (folder / "mark").touch()
    assert not (tmp_path / ".a[1].0123abcd.tmp").exists()


def test_a_link_to_an_earlier_result_is_replaced_and_its_target_is_not_touched(tmp_path: Path) -> None:
    real = tmp_path / "real"
    with replace_folder(real, "mark") as folder:
        (folder / "mark").write_text("1")
    (tmp_path / "link").symlink_to(real)
    with replace_folder(tmp_path / "link", "mark") as folder:
        (folder / "mark").write_text("2")
    assert (tmp_path / "link" / "mark").read_text() == "2"
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link"}


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "link/secret", ""])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    if name:
        with pytest.raises(InputError, match="inside"):
            inside(folder, name)
    assert inside(folder, "a/b") == folder.resolve() / "a" / "b"
