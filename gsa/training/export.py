"""A model as a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer` open."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from gsa.training.adapters import merged
from gsa.training.files import WEIGHTS, files_under, sync


def write_model(folder: Path, model: Any, tokenizer: Path) -> None:
    """Write config, generation config, tokenizer files and, last, the weights into `folder`.

    Weights of tied parameters are written once, adapters added to theirs. The files are not forced
    to disk.
    """
    write_config(folder, model, tokenizer)
    write_weights(folder, merged(saved_tensors(model)))


def write_config(folder: Path, model: Any, tokenizer: Path | None) -> None:
    """All of `write_model` but the weights. tokenizer: None for tokens that are no text."""
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    # A sharded model is of a class made for it.
    kind = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    model.config.architectures = [kind.__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def write_weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    """model.safetensors beside a config.json."""
    weights = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    # safetensors makes files for their owner alone; a model is to be as readable as its config.
    shutil.copymode(folder / "config.json", folder / WEIGHTS)


def export_into(folder: Path, write: Callable[[Path], None]) -> None:
    """What `write` writes into a folder, into one that holds other things; the weights last."""
    beside = folder / ".model.incomplete"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        write(beside)
        paths = sorted(files_under(beside), key=lambda path: path.name == WEIGHTS)
        for path in paths:
            sync(path)
        for path in paths:
            target = folder / path.relative_to(beside)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
        sync(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; of tied ones only the first."""
    first: dict[int, str] = {}
    tensors = model.state_dict(keep_vars=True)
    return {
        name: tensor
        for name, tensor in tensors.items()
        if first.setdefault(id(tensor), name) == name
    }
