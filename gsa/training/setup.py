"""What a run needs before it starts: the model's configuration and the device, or a clear error."""

import torch

from gsa.data import MixedShards, TokenShards
from gsa.model import GSAConfig
from gsa.training.config import TrainConfig


def build_model_config(
    config: TrainConfig, shards: TokenShards | MixedShards, validation: TokenShards | None
) -> GSAConfig:
    """The model's configuration: config.model, completed from the shards.

    ValueError if it contradicts itself, if the vocabulary does not reach every token of the shards,
    or if the validation shards come from another tokenizer.
    """
    if validation is not None and shards.tokenizer_key != validation.tokenizer_key:
        raise ValueError(
            f"validation: {validation.folder} and {shards.folder} were made with different "
            "tokenizers; prepare both with the same"
        )
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
    return model_config


def pick_device(name: str) -> torch.device:
    """The device of that name; ValueError if there is no such device here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {name} asked, but torch {torch.__version__} sees no CUDA device")
    return device
