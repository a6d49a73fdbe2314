"""The result document: written whole after every measurement, so a killed run leaves that much."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_result(path: Path, document: dict[str, Any]) -> None:
    """Writes a JSON file beside its place, then renames it."""
    write_text(path, json.dumps(document, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file beside its place, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.incomplete")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


class Results:
    """A document that knows what is still missing.

    "complete" becomes true at the end of a run that reached every case; "not_run" names the others.
    """

    def __init__(self, out: str, head: dict[str, Any], names: Sequence[str]):
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
