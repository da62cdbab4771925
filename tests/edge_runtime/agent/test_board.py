"""Profiles of boards: all readable, each fact with its source, and known to the doctor by the same names."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_runtime.agent.board import load_board
from edge_runtime.agent.doctor import BOARDS, MEMORY_WORDS, PI_COMMAND_LINE
from edge_runtime.errors import ConfigError

FOLDER = Path(__file__).parents[3] / "devices/boards"
PROFILES = sorted(FOLDER.glob("*.toml"))


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_every_profile_is_whole(path: Path) -> None:
    """Its file is called by its class, its cap leaves most of the memory to others, and each fact has a source."""
    board = load_board(path)
    assert board.device_class == path.stem
    assert board.cap * 4 <= board.memory
    assert board.facts
    about = {fact.about for fact in board.facts}
    assert "instruction sets" in about
    assert {"processor", "memory"} <= about or not board.models
    assert all(fact.says.endswith(".") and len(fact.source) > 5 for fact in board.facts)


def test_the_doctor_knows_the_same_boards() -> None:
    """Beginnings of names and classes are those of the profiles, and no name begins like another's."""
    profiles = [load_board(path) for path in PROFILES]
    assert {model: board.device_class for board in profiles for model in board.models} == BOARDS
    assert not [(a, b) for a in BOARDS for b in BOARDS if a != b and a.startswith(b)]


def test_a_proposed_temperature_is_below_that_of_a_source() -> None:
    """A profile that proposes one has a fact about heat; a Raspberry Pi's is below the 80 °C of its documentation."""
    profiles = [load_board(path) for path in PROFILES]
    proposing = [board for board in profiles if board.eligibility.highest_celsius is not None]
    assert {board.name.partition(" Pi")[0] for board in proposing} == {"Raspberry"}
    for board in proposing:
        assert any(fact.about == "thermal" and " 80 " in fact.says for fact in board.facts)
        assert board.eligibility.highest_celsius < 80


def test_a_raspberry_pi_is_told_the_doctors_cure() -> None:
    """Page, profile and doctor name the same words and the same file."""
    page = (FOLDER.parents[1] / "docs/install/raspberry-pi.md").read_text()
    for text in (page, (FOLDER / "raspberry-pi-5.toml").read_text()):
        assert MEMORY_WORDS in text
        assert PI_COMMAND_LINE in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("cores = 4", "cores = 0"), "cores"),
        (('cap = "512M"', "cap = 512"), 'did you mean "512M"'),
        (("cores = 4", "core = 4"), "did you mean 'cores'"),
        (('about = "processor"', 'about = "colour"'), "is none of"),
        (("source = ", "sauce = "), "did you mean 'source'"),
        (("highest_celsius = 75.0", "highest_celcius = 75.0"), "did you mean 'highest_celsius'"),
    ],
)
def test_a_slip_is_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    """Profiles are read as strictly as a device's configuration."""
    text = (FOLDER / "raspberry-pi-5.toml").read_text()
    assert change[0] in text
    (tmp_path / "board.toml").write_text(text.replace(*change, 1))
    with pytest.raises(ConfigError, match=message):
        load_board(tmp_path / "board.toml")
