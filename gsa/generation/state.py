"""What a model remembers of a text, apart from the model: kept, forked, saved as a file.

state = decoder.prefill(tokens)
state.save("book.safetensors")
state = ModelState.load("book.safetensors")
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from gsa.model import GSAConfig

FORMAT = "gated-slots state 2"
WITHOUT_EFFECT = {"initializer_range", "max_position_embeddings", "use_cache"}


@dataclass(frozen=True, kw_only=True)
class ModelState:
    """A text as one model remembers it. Its tensors are never written into, so they are shared.

    The last token is not in the tensors yet: what reads it also tells what comes next.
    """

    tensors: Mapping[str, Tensor]
    """By name, "layers.3.memory" and so on: one row each; none after a single token."""
    tokens: int
    """How many tokens the text has."""
    last: int
    """The last of them."""
    met: Tensor
    """bool [W]: which words occurred."""
    fingerprint: str
    """Of the model that read it."""

    def fork(self) -> "ModelState":
        """A state to go on with; this one stays as it is (as it does anyway). Copies nothing."""
        return replace(self)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file beside its place, then renames it; an older one is replaced.

        ValueError, FileExistsError as from `check_place`; OSError if there is no room.
        """
        path = Path(path)
        check_place(path)
        # Copies: layers may share their positions, which a file of tensors must not.
        dense = torch.contiguous_format
        held = {name: t.cpu().clone(memory_format=dense) for name, t in self.tensors.items()}
        held["met"] = self.met.nonzero()[:, 0].cpu()
        metadata = {
            "format": FORMAT,
            "model": self.fingerprint,
            "tokens": str(self.tokens),
            "last": str(self.last),
            "words": str(self.met.numel()),
        }
        metadata["checksum"] = _digest(metadata, held)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.incomplete")
        try:
            save_file(held, beside, metadata)
            beside.replace(path)
        except SafetensorError as error:
            raise OSError(f"state: {path} could not be written ({error})") from error
        finally:
            beside.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | Path) -> "ModelState":
        """Reads a file that `save` wrote, to the CPU; the decoder checks that the model is its own.

        FileNotFoundError without the file, ValueError if it is no such file or damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; gsa prefill writes one")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(
                        f"{path}: expected a model's state ({FORMAT!r}), got "
                        f"{metadata.get('format', 'another safetensors file')!r}"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot be read ({error}); damaged?") from error
        if metadata.pop("checksum", "") != _digest(metadata, tensors):
            raise ValueError(f"{path}: not a whole state (its checksum is another); damaged?")
        try:
            met = torch.zeros(int(metadata["words"]), dtype=torch.bool)
            met[tensors.pop("met")] = True
            return ModelState(
                tensors=tensors,
                tokens=int(metadata["tokens"]),
                last=int(metadata["last"]),
                met=met,
                fingerprint=metadata["model"],
            )
        except (KeyError, ValueError, IndexError, RuntimeError) as error:
            raise ValueError(f"{path}: not a whole state ({error!r}); damaged?") from error


def check_place(path: Path) -> None:
    """FileExistsError if a state would replace anything but a state; ValueError for a folder."""
    if path.is_dir():
        raise ValueError(f"state: expected a file to write, got the folder {path}")
    if not path.exists():
        return
    try:
        with safe_open(path, "pt") as file:
            earlier = (file.metadata() or {}).get("format") == FORMAT
    except SafetensorError:
        earlier = False
    if not earlier:
        raise FileExistsError(
            f"state: {path} exists and is no model's state; choose another, or remove it yourself"
        )


def fingerprint(model: Any) -> str:
    """Tells models apart whose states differ: a hash over what its config says and every weight.

    Weights are summed up on their own device. The same weights in another dtype are another model.
    """
    own = {f.name for f in fields(GSAConfig)} - {f.name for f in fields(PreTrainedConfig)}
    said = {name: getattr(model.config, name) for name in own - WITHOUT_EFFECT}
    return _digest(said, model.state_dict())


def _digest(said: Mapping[str, object], tensors: Mapping[str, Tensor]) -> str:
    facts: list[object] = [dict(sorted(said.items()))]
    for name, tensor in sorted(tensors.items()):
        facts.append([name, list(tensor.shape), str(tensor.dtype), checksum(tensor)])
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:32]


def checksum(tensor: Tensor) -> int:
    """Sum of a tensor's bits as 64-bit integers, each times an odd number of its own, mod 2^64.

    Any one number that changes, changes it; order matters; the device does not.
    """
    raw = tensor.detach().contiguous().flatten().view(torch.uint8)
    if raw.storage_offset() % 8:
        raw = raw.clone()
    whole = raw.numel() // 8 * 8
    rest = torch.zeros(8, dtype=torch.uint8, device=raw.device)
    rest[: raw.numel() - whole] = raw[whole:]
    total, words, step = rest.view(torch.int64)[0], raw[:whole].view(torch.int64), 1 << 24
    for start in range(0, words.numel(), step):
        part = words[start : start + step]
        odd = torch.arange(start, start + part.numel(), device=raw.device) * 2 + 3
        total = total + (part * odd).sum()
    return int(total)
