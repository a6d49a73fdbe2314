"""A model's folder, opened for evaluation: ours of any architecture, or transformers' own."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from gsa.data.encoding import load_tokenizer
from gsa.evaluation.config import EvalConfig
from gsa.generation.text import DTYPES, load, to_device
from gsa.model import GSAForCausalLM


def is_ours(model: Any) -> bool:
    """Whether it is of this package: its state can be carried on and forked."""
    return isinstance(model, GSAForCausalLM)


def read_config(folder: str) -> dict[str, Any]:
    """config.json of a model's folder.

    FileNotFoundError without the folder, ValueError if it is not one of a model.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; expected that of a model")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config["model_type"]
    except FileNotFoundError:
        raise ValueError(f"{path}: not a model folder (config.json is missing)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / 'config.json'}: not a model's config ({error!r})") from None
    return config


def open_tokenizer(folder: str) -> Any:
    """The tokenizer in a model's folder, without its weights; errors as `open_model`."""
    read_config(folder)
    return load_tokenizer(folder)


def open_model(config: EvalConfig) -> Any:
    """The model that an evaluation asks for, in eval mode on its device; nothing is downloaded.

    FileNotFoundError without the folder, ValueError if it has no model, or a damaged one.
    """
    if read_config(config.model)["model_type"] == "gsa":
        model = load(config.model, config.dtype)[0]
    else:
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                config.model,
                dtype=DTYPES[config.dtype],
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{config.model}: no causal language model ({error})") from error
    return model.to(to_device(config.device)).eval()


def context_length(config: EvalConfig, model_config: Any) -> int:
    """Tokens that a model is shown at most; ValueError where neither says."""
    length = config.length or getattr(model_config, "max_position_embeddings", None)
    if not length:
        raise ValueError("length: expected a number: the model's config names none, got 0")
    return int(length)


def model_facts(model: Any, folder: str) -> dict[str, object]:
    """What was evaluated, ready for JSON."""
    return {
        "folder": folder,
        "model_type": model.config.model_type,
        "mixer": getattr(model.config, "mixer", None),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
