"""A model as a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer` open."""

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from gsa.training.files import WEIGHTS, files_under, sync


def write_model(folder: Path, model: Any, tokenizer: Path) -> None:
    """Write config, generation config, tokenizer files and, last, the weights into `folder`.

    Weights of tied parameters are written once. The files are not forced to disk.
    """
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    weights = {name: t.detach().contiguous() for name, t in saved_tensors(model).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    # safetensors makes files for their owner alone; a model is to be as readable as its config.
    shutil.copymode(folder / "config.json", folder / WEIGHTS)


def export_model(folder: Path, model: Any, tokenizer: Path) -> None:
    """`write_model` into a folder that holds other things, the weights appearing last and whole."""
    beside = folder / ".model.incomplete"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        write_model(beside, model, tokenizer)
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
