"""Hugging Face datasets as inputs of `gsa data prepare`.

    hf:OWNER/NAME[/CONFIG][@SPLIT]    a dataset of the hub
    hf:FOLDER[@SPLIT]                 a local folder: of Dataset.save_to_disk, or of data files

A folder that exists comes before the hub. The split is "train" unless given. Rows are read in the
dataset's own order, also as a stream: the order of training is made later, by position.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gsa.data.readers import Advance, Piece, checked_text

PREFIX = "hf:"
_ROWS = 64


class Address(NamedTuple):
    """What an hf: input names: a local folder, or a dataset and configuration of the hub."""

    folder: Path | None
    name: str
    config: str | None
    split: str | None

    def __str__(self) -> str:
        """What the shard index keeps: no path outside the input."""
        name = self.folder.resolve().name if self.folder else self.name
        parts = name if self.config is None else f"{name}/{self.config}"
        return parts if self.split is None else f"{parts}@{self.split}"


@dataclass(frozen=True)
class DatasetSource:
    """One split of a dataset, as an input."""

    name: str
    place: str
    identity: str
    size: int | None
    """Bytes in memory, for the progress bar; None for a stream, whose end is not known."""
    dataset: Any

    def pieces(self, text_key: str, advance: Advance) -> Iterator[Piece]:
        """The rows as documents, in the dataset's own order."""
        number, total = 0, None if self.size is None else self.dataset.num_rows
        with _as_value_error(f"{self.place} could not be read on"):
            batches = self.dataset.iter(batch_size=_ROWS)
        while True:
            with _as_value_error(f"{self.place} could not be read on after row {number}"):
                batch = next(batches, None)
            if batch is None:
                return
            if text_key not in batch:
                raise _without_column(self.place, text_key, list(batch))
            for value in batch[text_key]:
                number += 1
                place = f"{self.place}, row {number}"
                yield Piece(checked_text(value, place, text_key), True)
            if self.size is not None and total:
                advance(self.size * len(batch[text_key]) // total)


def is_dataset(given: str) -> bool:
    """Whether an input names a Hugging Face dataset."""
    return given.startswith(PREFIX)


def parse_address(given: str) -> Address:
    """What `given` (hf:…) names; FileNotFoundError or ValueError if it can be neither."""
    text = given.removeprefix(PREFIX)
    if text and Path(text).is_dir():
        return Address(Path(text), "", None, None)
    text, at, split = text.rpartition("@") if "@" in text else (text, "", "")
    if not text or (at and not split):
        raise ValueError(
            f"inputs: expected hf:OWNER/NAME, hf:OWNER/NAME/CONFIG@SPLIT or hf:FOLDER, got {given}"
        )
    if Path(text).is_dir():
        return Address(Path(text), "", None, split or None)
    parts = text.split("/")
    if len(parts) > 3 or parts[0] in ("", ".", "..", "~"):
        raise FileNotFoundError(f"inputs: {given}: no such folder {text}")
    config = parts[2] if len(parts) == 3 else None
    return Address(None, "/".join(parts[:2]), config, split or "train")


def open_dataset(given: str, *, text_key: str, streaming: bool, quiet: bool) -> DatasetSource:
    """The dataset that `given` names, opened.

    Without `streaming` the hub's dataset is downloaded whole and kept in the cache of `datasets`.
    ImportError without `datasets`; ValueError naming the dataset if it cannot be opened, or has no
    column `text_key`; FileNotFoundError for a folder that does not exist.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(
            f"inputs: {given} needs the package datasets; pip install 'gated-slots[data]'"
        )
    from datasets import IterableDataset

    address = parse_address(given)
    with _progress_bars(shown=not quiet), _as_value_error(f"inputs: {given} could not be opened"):
        dataset, address = _load(address, streaming)
    columns = dataset.column_names
    if columns is not None:
        if text_key not in columns:
            raise _without_column(f"inputs: {given}", text_key, columns)
        dataset = dataset.select_columns([text_key])
    size = None if isinstance(dataset, IterableDataset) else int(dataset.data.nbytes)
    identity = f"{address.folder.resolve()}@{address.split}" if address.folder else str(address)
    return DatasetSource(str(address), given, PREFIX + identity, size, dataset)


def _load(address: Address, streaming: bool) -> tuple[Any, Address]:
    """The dataset, and its address with the split that was read."""
    import datasets

    if int(datasets.__version__.split(".")[0]) < 4:  # older ones may run a dataset's own code
        raise ImportError("inputs: hf: needs datasets 4 or newer; pip install -U datasets")
    folder = address.folder
    if folder is None or not _was_saved(folder):
        address = address._replace(split=address.split or "train")
        path = address.name if folder is None else str(folder)
        return (
            datasets.load_dataset(path, address.config, split=address.split, streaming=streaming),
            address,
        )
    found = datasets.load_from_disk(str(folder))  # mapped into memory: nothing is copied
    if isinstance(found, datasets.Dataset):
        if address.split not in (None, str(found.split)):
            raise ValueError(f"it holds one dataset (split {found.split}), not {address.split}")
        return found, address
    address = address._replace(split=address.split or "train")
    if address.split not in found:
        raise ValueError(
            f"expected one of the splits {', '.join(map(str, found))}, got {address.split}"
        )
    return found[address.split], address


def _was_saved(folder: Path) -> bool:
    """Whether save_to_disk wrote the folder, of one dataset or of several splits."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _without_column(place: str, text_key: str, columns: list[str]) -> ValueError:
    names = ", ".join(map(repr, columns)) or "none"
    return ValueError(
        f"{place}: expected the column {text_key!r}, got columns {names}; set text_key"
    )


@contextmanager
def _as_value_error(what: str) -> Iterator[None]:
    """What `datasets` raises for data that is missing, broken or out of reach, as one sentence."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, DatasetsError) as error:
        reason = error.__cause__ if isinstance(error, DatasetsError) else None
        raise ValueError(f"{what}: {reason or error}") from error


@contextmanager
def _progress_bars(*, shown: bool) -> Iterator[None]:
    """Hides the progress bars of `datasets` while it works, unless they are to be shown."""
    import datasets

    hide = not shown and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()
