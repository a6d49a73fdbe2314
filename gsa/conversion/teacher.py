"""A teacher's folder, opened and checked: nothing of its weights is read but where they are."""

import json
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gsa.conversion.families import FAMILIES, Family, is_left_out

CONFIG = "config.json"
ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Entry:
    """Where a weight lies, and what it is."""

    file: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Teacher:
    """A folder whose config and weights belong together.

    config: transformers' own, with its defaults filled in.
    weights: by the teacher's names; without those that a model computes.
    left_out: names of the latter, and of a head that is the embedding once more.
    """

    folder: Path
    config: Any
    family: Family
    weights: dict[str, Entry]
    left_out: tuple[str, ...]

    @property
    def files(self) -> list[str]:
        """Names of the files with weights, in order."""
        return sorted({entry.file for entry in self.weights.values()})

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Weights by name, memory-mapped where the platform can."""
        found = {}
        with ExitStack() as stack:
            opened: dict[str, Any] = {}
            for name in names:
                file = self.weights[name].file
                if file not in opened:
                    source = safe_open(self.folder / file, framework="pt")
                    opened[file] = stack.enter_context(source)
                found[name] = opened[file].get_tensor(name)
        return found

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of a matrix."""
        with safe_open(self.folder / self.weights[name].file, framework="pt") as opened:
            return opened.get_slice(name)[start:stop]


def open_teacher(folder: str | Path) -> Teacher:
    """Opens a local Hugging Face folder of a family that can be converted.

    Raises:
        FileNotFoundError: no such folder, no config, weights that the index names are not there.
        ValueError: another family, quantised weights, a damaged file, weights that do not fit.
    """
    teacher = open_config(folder)
    weights = _entries(teacher.folder)
    left_out = [name for name in weights if is_left_out(name)]
    weights = {name: entry for name, entry in weights.items() if name not in left_out}
    teacher = replace(teacher, weights=weights, left_out=tuple(left_out))
    if teacher.config.tie_word_embeddings and {HEAD, EMBEDDINGS} <= set(weights):
        return _without_tied_head(teacher)
    return teacher


def open_config(folder: str | Path) -> Teacher:
    """The same without weights: its config.json is enough. Raises as for that."""
    folder = Path(folder)
    family = _family(folder)
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"teacher: expected a {CONFIG} that transformers can read, got {error!r}"
        ) from error
    return Teacher(folder, config, family, {}, ())


def _family(folder: Path) -> Family:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"teacher: expected a local Hugging Face folder, got {folder}, which is none; download "
            "it first (hf download OWNER/NAME --local-dir FOLDER)"
        )
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"teacher: expected a {CONFIG} in {folder}, found none")
    config = _read_json(path)
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise ValueError(
            f"teacher: expected a model_type of {', '.join(FAMILIES)}, got "
            f"{config.get('model_type')!r} in {path}"
        )
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else ""
        raise ValueError(
            f"teacher: expected weights in fp32, bf16 or fp16, got quantised ones ({method}, see "
            f"quantization_config in {path}); take the original, or dequantise it first"
        )
    return family


def _entries(folder: Path) -> dict[str, Entry]:
    """What the headers of the weights' files say, checked against the index if there is one."""
    weight_map = None
    if (folder / INDEX).is_file() and not (folder / ONE_FILE).is_file():  # as transformers choose
        weight_map = _weight_map(folder / INDEX)
    files = [ONE_FILE] if weight_map is None else sorted(set(weight_map.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        others = sorted(
            path.name for path in folder.glob("*") if path.suffix in (".bin", ".gguf", ".pth")
        )
        hint = f" (it holds {', '.join(others)}, which cannot be read)" if others else ""
        raise FileNotFoundError(
            f"teacher: expected {len(files)} files of weights in {folder}, missing "
            f"{', '.join(missing)}{hint}; download them, or save the model as safetensors first"
        )
    entries: dict[str, Entry] = {}
    for file in files:
        for name, entry in _header(folder, file).items():
            if name in entries:
                raise ValueError(f"teacher: {name} is in {entries[name].file} and in {file}")
            entries[name] = entry
    _check_index(weight_map, entries)
    _check_dtypes(entries)
    return entries


def _weight_map(path: Path) -> dict[str, str]:
    """The files of all weights by name, as an index says."""
    found = _read_json(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ValueError(f"teacher: expected a weight_map in {path}, found none; download it again")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        reason = f"it holds a {type(found).__name__}"
    except ValueError as error:
        reason = str(error)
    raise ValueError(f"teacher: expected {path} to be a JSON object ({reason}); download it again")


def _header(folder: Path, file: str) -> dict[str, Entry]:
    try:
        with safe_open(folder / file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: Entry(file, tuple(part.get_shape()), part.get_dtype())
                for name, part in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(
            f"teacher: expected {folder / file} to be a whole safetensors file, got "
            f"{(folder / file).stat().st_size} bytes that are not ({error}); download it again"
        ) from error


def _check_index(weight_map: dict[str, str] | None, entries: dict[str, Entry]) -> None:
    wrong = sorted(
        name
        for name, file in (weight_map or {}).items()
        if name not in entries or entries[name].file != file
    )
    if wrong:
        raise ValueError(
            f"teacher: {INDEX} promises {len(wrong)} weights that are not where it says, "
            f"{_some(wrong)}; its files belong to different models or downloads"
        )


def _check_dtypes(entries: dict[str, Entry]) -> None:
    others = {entry.dtype: name for name, entry in entries.items() if entry.dtype not in DTYPES}
    if others:
        dtype, name = next(iter(others.items()))
        raise ValueError(
            f"teacher: expected weights in {', '.join(DTYPES)}, got {dtype} for {name}: quantised "
            "weights cannot be read; take the original, or dequantise it first"
        )


def _without_tied_head(teacher: Teacher) -> Teacher:
    """Without a head that is the embedding once more; ValueError if it is another."""
    step, rows = 8192, teacher.weights[HEAD].shape[0]
    same = teacher.weights[HEAD].shape == teacher.weights[EMBEDDINGS].shape and all(
        teacher.rows(HEAD, i, i + step).equal(teacher.rows(EMBEDDINGS, i, i + step))
        for i in range(0, rows, step)
    )
    if not same:
        raise ValueError(
            f"teacher: tie_word_embeddings: expected {HEAD} to equal {EMBEDDINGS}, or to be "
            "absent, got another; if it is to count, set tie_word_embeddings to false in its "
            f"{CONFIG}"
        )
    weights = {name: entry for name, entry in teacher.weights.items() if name != HEAD}
    return Teacher(
        teacher.folder, teacher.config, teacher.family, weights, (*teacher.left_out, HEAD)
    )


def _some(names: list[str]) -> str:
    """A few names of many."""
    return ", ".join(names[:4]) + (" …" if len(names) > 4 else "")
