"""What tests share is made once, whole or not at all, and stays as it was made."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from tests import shared_folders
from tests.shared_folders import changed_folders, shared_folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for shared folders, of which this process has used none."""
    monkeypatch.setattr(shared_folders, "_opened", lambda: (tmp_path, None))
    monkeypatch.setattr(shared_folders, "_used", set())
    return tmp_path


def test_a_folder_is_made_once_for_all_who_ask_at_once(place: Path) -> None:
    """Whoever asks while it is made waits for it, and every answer is the same whole folder."""
    makers, answers = [], []

    def make(folder: Path) -> None:
        makers.append(folder)
        folder.mkdir()
        time.sleep(0.1)
        (folder / "file").write_text("whole")

    def ask() -> None:
        answers.append(shared_folder("thing", ("a", 1), make) / "file")

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(makers) == 1
    assert [path.read_text() for path in answers] == ["whole"] * 4
    assert shared_folder("thing", ("a", 2), make) != answers[0].parent
    assert changed_folders() == []


def test_a_maker_that_fails_leaves_no_folder(place: Path) -> None:
    """What was half made is gone, and the next to ask makes it."""

    def fail(folder: Path) -> None:
        folder.mkdir()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        shared_folder("thing", (), fail)
    assert [path.suffix for path in place.iterdir()] == [".lock"]
    assert shared_folder("thing", (), Path.mkdir).is_dir()


def test_a_folder_that_a_test_changed_is_named_and_removed(place: Path) -> None:
    """A file written into a shared folder is noticed at the end, and the folder does not serve another run."""
    kept, spoiled = (shared_folder(name, (), Path.mkdir) for name in ("kept", "spoiled"))
    (spoiled / "file").write_text("a slip")
    assert changed_folders() == [spoiled]
    assert kept.exists()
    assert not spoiled.exists()
