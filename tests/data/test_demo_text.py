"""The demo's held-out works are whole, and nowhere in its training text."""

import re
from pathlib import Path

import numpy as np
import pytest

TEXT = Path(__file__).parents[2] / "demo" / "text"
TRAIN = sorted((TEXT / "train").glob("*.txt"))
VALID = sorted((TEXT / "valid").glob("*.txt"))


def letters(path: Path) -> np.ndarray:
    """The lower-case letters alone: spelling of spaces, case and points cannot hide a copy."""
    data = np.frombuffer(path.read_bytes().lower(), dtype=np.uint8)
    return data[(data >= ord("a")) & (data <= ord("z"))]


def windows(data: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit hash of every run of `length` letters."""
    hashed = np.zeros(len(data) - length + 1, dtype=np.uint64)
    for i in range(length):
        part = data[i : len(data) - length + 1 + i].astype(np.uint64)
        hashed = hashed * np.uint64(0x100000001B3) + part
    return hashed


def shared(train: list[np.ndarray], valid: np.ndarray, length: int) -> int:
    known = np.concatenate([windows(data, length) for data in train])
    return int(np.isin(windows(valid, length), known).sum())


def test_no_long_run_of_letters_is_in_both_parts():
    train = [letters(path) for path in TRAIN]
    for path in VALID:
        assert shared(train, letters(path), 40) == 0, path.name
    # The measure sees what it looks for: one speech copied into training is found.
    speech = letters(VALID[0])[5000:5100]
    assert shared([*train, speech], letters(VALID[0]), 40) == 61


def test_works_and_sizes():
    assert [path.stem for path in VALID] == ["comedy_of_errors", "macbeth"]
    assert "romeo_and_juliet" in [path.stem for path in TRAIN]
    assert not {path.stem for path in TRAIN} & {path.stem for path in VALID}
    sizes = [path.stat().st_size for path in (*TRAIN, *VALID)]
    assert max(sizes) < 400_000
    assert 1_000_000 < sum(sizes) < 2_000_000


@pytest.mark.parametrize("path", [*TRAIN, *VALID], ids=lambda path: path.stem)
def test_every_play_has_the_one_plain_form(path):
    text = path.read_bytes().decode("ascii")
    assert "gutenberg" not in text.lower()
    assert not re.search(r"[\[\]{}_\t\r]|^ | $|\n\n\n", text, re.MULTILINE)
    for speech in text.rstrip("\n").split("\n\n"):
        heading, *lines = speech.split("\n")
        assert re.fullmatch(r"[A-Z][A-Z' ,&-]*:", heading), speech
        assert lines and all(lines), speech
    assert text.count("\n\n") > 500


def test_romeo_speaks():
    assert (TEXT / "train/romeo_and_juliet.txt").read_text().count("\nROMEO:\n") > 150
