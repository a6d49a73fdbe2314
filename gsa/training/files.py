"""Names in a run folder. Writing so that nothing half-written looks complete: beside, forced to
disk, then renamed."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gsa.training.errors import RunError

SETTINGS = "train.json"
CHECKPOINTS = "checkpoints"
WEIGHTS = "model.safetensors"


def sync(path: Path) -> None:
    """Force a file, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Says which file an OSError is about, where the system does not: on a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def incomplete(path: Path) -> Path:
    """Where a file is until it is whole; a killed process may leave it there."""
    return path.with_name(f".{path.name}.incomplete")


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, or leave what was there."""
    beside = incomplete(path)
    try:
        with naming(path):
            beside.write_text(text, encoding="utf-8")
            sync(beside)
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a whole JSON file, or leave what was there."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_object(path: Path, parts: Mapping[str, type] = MappingProxyType({})) -> dict[str, Any]:
    """The JSON object in a file of ours; RunError, naming the file, if it is none or damaged.

    parts: what has to be in it, and as what.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: damaged ({error})") from None
    if not isinstance(found, dict):
        raise RunError(f"{path}: damaged (no JSON object)")
    check_kinds(path, dict.fromkeys(parts) | found, parts)
    return found


def check_kinds(path: Path, found: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    """RunError, naming the file, if a value that was found in it is of another kind."""
    for key in kinds.keys() & found.keys():
        if not isinstance(found[key], kinds[key]):
            kind = "object" if kinds[key] is dict else kinds[key].__name__
            got = repr(found[key])
            raise RunError(f"{path}: damaged ({key}: expected {kind}, got {got[:80]})")


def check_result(out: str, key: str, maker: str) -> None:
    """Before the work: OSError if its result would replace anything but an earlier one.

    Or if no file can be made there.

    Args:
        out: the file; "" for none.
        key: what is in the JSON object of every result of the kind.
        maker: the command that makes them.
    """
    if not out:
        return
    path = Path(out)
    if path.exists():
        try:
            earlier = key in json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            earlier = False
        if not earlier:
            raise FileExistsError(f"out: {out} exists and is no result of {maker}; choose another")
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise PermissionError(f"out: expected a file that can be made, but in {place} none can")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_under(folder: Path) -> list[Path]:
    """Every file of a folder and the folders in it, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
