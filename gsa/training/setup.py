"""What a run needs before it starts: the model and the device, or a clear error."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from gsa.data import MixedShards, TokenShards
from gsa.model import GSAConfig, GSAForCausalLM
from gsa.model.loading import without_bars
from gsa.training.adapters import adapt
from gsa.training.blocks import prepare_blocks, sum_blocks_in
from gsa.training.config import TrainConfig
from gsa.training.distributed import Team
from gsa.training.optimizer import rate_of


def build_model_config(
    config: TrainConfig, shards: TokenShards | MixedShards, validation: TokenShards | None
) -> GSAConfig:
    """The model's configuration: config.model, completed from the shards.

    ValueError if it contradicts itself, if the vocabulary does not reach every token of the shards,
    or if the validation shards or the model in `init` have another tokenizer.
    """
    if validation is not None and shards.tokenizer_key != validation.tokenizer_key:
        raise ValueError(
            f"validation: {validation.folder} and {shards.folder} were made with different "
            "tokenizers; prepare both with the same"
        )
    if config.init:
        model_config = init_config(config.init)
        shards.require_vocab_size(model_config.vocab_size)
        shards.require_tokenizer(config.init)
        return model_config
    tokenizer = shards.load_tokenizer()
    completed = {
        "vocab_size": shards.vocab_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": shards.eos_id,
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": config.seq_len,
    }
    model_config = GSAConfig(**{**completed, **config.model})
    shards.require_vocab_size(model_config.vocab_size)
    words = model_config.vocab_size
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = getattr(model_config, key)
        every = given if isinstance(given, list) else [given]
        if not all(one is None or 0 <= one < words for one in every):
            raise ValueError(f"{key}: expected tokens from 0 to {words - 1}, got {given}")
    return model_config


def init_config(folder: str) -> GSAConfig:
    """ValueError if the folder holds no model of ours."""
    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"init: expected a model folder, got {folder}, without config.json")
    kind = PretrainedConfig.get_config_dict(folder)[0].get("model_type")
    if kind != GSAConfig.model_type:
        hint = "gsa convert makes a GSA model of some"
        raise ValueError(f"init: expected a GSA model, got model_type {kind!r} in {folder}; {hint}")
    found = GSAConfig.from_pretrained(folder)
    assert isinstance(found, GSAConfig)
    return found


def pick_device(name: str, team: Team) -> torch.device:
    """The device of that name, or a GPU per process; ValueError if there is no such device here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {name} asked, but torch {torch.__version__} sees no CUDA device")
    try:
        torch.empty(1, device=device).item()
    except RuntimeError as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"device: {name!r} cannot be used here ({why})") from error
    if team.mesh is None or device.type != "cuda":
        return device
    if device.index is not None:
        raise ValueError(f"device: expected cuda with several processes (a GPU each), got {name}")
    return torch.device("cuda", torch.cuda.current_device())


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the one that streams, graphs and generators mean where they name none."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check_team(config: TrainConfig, team: Team) -> None:
    """ValueError unless every process gets as many rows, or if something takes one process."""
    if config.cuda_graph and team.mesh is not None:
        raise ValueError(f"cuda_graph: expected false with {team.world} processes; one can record")
    if config.rows % team.world:
        raise ValueError(
            f"rows: expected a multiple of {team.world}, the number of processes, got "
            f"{config.rows}; rows · accumulation decides what a step is, so change both"
        )


def build_model(
    config: TrainConfig, model_config: GSAConfig, device: torch.device, team: Team
) -> Any:
    """The model with its initial weights, the same for any number of processes, ready to train."""
    torch.manual_seed(config.seed)
    model: Any
    if config.init:
        with without_bars():
            model = GSAForCausalLM.from_pretrained(config.init, config=model_config)
    else:
        model = GSAForCausalLM(model_config)
    model.to(torch.float32 if config.master_weights else torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(rate_of(name, config.rates) > 0)
    if config.lora:
        adapt(model, config.lora, config.seed)
    if team.mesh is None:
        model.to(device)
        if config.dtype == "bf16":
            sum_blocks_in(model, torch.bfloat16)  # as several processes do
    model.train()
    prepare_blocks(model, config)
    team.shard(model, config)  # moves it to the device, too, block by block
    return model
