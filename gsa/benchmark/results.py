"""The result document: written whole after every measurement, so a killed run leaves that much."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gsa.training.files import check_result, write_json


def check_out(out: str) -> None:
    """Before measuring: OSError if `out` holds anything but a result, or cannot be written."""
    check_result(out, "benchmark", "gsa bench")


def write_result(path: Path, document: dict[str, Any]) -> None:
    """Writes a JSON file beside its place, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)


class Results:
    """A document that knows what is still missing.

    "complete" becomes true at the end of a run that reached every case; "not_run" names the others.
    OSError as from `check_out`.
    """

    def __init__(self, out: str, head: dict[str, Any], names: Sequence[str]):
        check_out(out)
        self.path = Path(out) if out else None
        self.document = head | {"complete": False, "not_run": list(names), "steps": [], "rows": []}
        self.save()

    def put(self, key: str, value: object) -> None:
        self.document[key] = value
        self.save()

    def reached(self, name: str, key: str, value: object) -> None:
        """A case's result: appended if `key` is a list of such."""
        self.document["not_run"].remove(name)
        if isinstance(self.document.get(key), list):
            self.document[key].append(value)
        else:
            self.document[key] = value
        self.save()

    def finish(self) -> dict[str, Any]:
        self.document["complete"] = not self.document["not_run"]
        self.save()
        return self.document

    def save(self) -> None:
        if self.path is not None:
            write_result(self.path, self.document)
