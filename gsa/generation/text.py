"""Text from a model's folder, token by token, through the recurrent memory.

for piece in generate_text(GenerateConfig(model="runs/demo", prompt="ROMEO:")):
    print(piece, end="", flush=True)
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer

from gsa.generation.config import GenerateConfig
from gsa.model import GSAForCausalLM


def load(folder: str | Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder on this machine; nothing is downloaded.

    FileNotFoundError without the folder, ValueError if it is no GSA model, is unfinished or
    damaged, or has no tokenizer.
    """
    path = Path(folder)
    _check_model_folder(path)
    try:
        model = GSAForCausalLM.from_pretrained(path, local_files_only=True)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: the weights cannot be read ({error}); damaged?") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: no tokenizer could be loaded ({error})") from error
    return model.eval(), tokenizer


def _check_model_folder(path: Path) -> None:
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such folder; expected the folder of a GSA model")
    if path.name.endswith(".incomplete"):
        raise ValueError(f"{path}: half written; use a folder without .incomplete")
    has_weights = any(path.glob("*.safetensors"))
    if (path / "train.json").is_file() and not has_weights:
        done = sorted(path.glob("checkpoints/step-*[0-9]"))
        hint = f", or use its newest checkpoint: {done[-1]}" if done else ""
        raise ValueError(f"{path}: this run is not finished; run gsa train again{hint}")
    config = path / "config.json"
    if not config.is_file():
        raise ValueError(f"{path}: not a model folder (config.json is missing)")
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
        model_type = found.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config}: expected a JSON object, got {error}") from None
    if model_type != "gsa":
        raise ValueError(f"{path}: expected a GSA model (model_type 'gsa'), got {model_type!r}")
    if not has_weights:
        raise ValueError(
            f"{path}: no *.safetensors weights (others are pickles, which are never loaded)"
        )


def generate_text(config: GenerateConfig) -> Iterator[str]:
    """The continuation of config.prompt, in pieces as soon as they are whole characters."""
    model, tokenizer = load(config.model)
    model.to(_device(config.device))
    prompt = tokenizer(config.prompt)["input_ids"]
    if not prompt:
        raise ValueError("prompt: expected some text: this tokenizer starts no document by itself")
    stream = TextStream(tokenizer, prompt)
    for token in generate_tokens(model, prompt, config):
        yield stream.add(token)
    yield stream.end()


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {name!r} cannot be used here ({error})") from error


@torch.inference_mode()
def generate_tokens(model: Any, prompt: list[int], config: GenerateConfig) -> Iterator[int]:
    """Token ids after the prompt, one model step each, up to the end-of-document token."""
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    generator = torch.Generator(device=model.device).manual_seed(config.seed)
    ids = torch.tensor([prompt], device=model.device)
    cache = None
    for _ in range(config.max_new_tokens):
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        token = int(pick_token(output.logits[0, -1].float(), config, generator))
        if token in ends:
            return
        yield token
        ids = torch.tensor([[token]], device=model.device)


def pick_token(logits_W: Tensor, config: GenerateConfig, generator: torch.Generator) -> Tensor:
    """The likeliest token, or one drawn after temperature, top-k and top-p, in that order."""
    if config.greedy:
        return logits_W.argmax()
    logits_W = logits_W / config.temperature
    if 0 < config.top_k < logits_W.numel():
        least = logits_W.topk(config.top_k).values[-1]
        logits_W = logits_W.masked_fill(logits_W < least, -torch.inf)
    probs_W = logits_W.softmax(0)
    if config.top_p < 1:
        sorted_W, order_W = probs_W.sort(descending=True, stable=True)
        # A token stays if those before it fall short of top_p; the first always does.
        unneeded_W = sorted_W.cumsum(0) - sorted_W >= config.top_p
        probs_W = probs_W.index_fill(0, order_W[unneeded_W], 0.0)
    return torch.multinomial(probs_W, 1, generator=generator)


class TextStream:
    """Token ids in, text out, holding back characters whose bytes are not all there yet.

    What has been given out is never taken back: the pieces joined are the whole text, as the
    tokenizer decodes it after the prompt.
    """

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        # A few tokens before, since some tokenizers write a space only after another token.
        self._ids = list(prompt[-8:])
        self._shown = len(self._ids)

    def add(self, token: int) -> str:
        """The text that this token completes; "" if it ends within a character."""
        self._ids.append(token)
        text = self._new_text()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._ids = self._ids[-8:]
        self._shown = len(self._ids)
        return text

    def end(self) -> str:
        """What is left when no more tokens come."""
        return self._new_text()

    def _new_text(self) -> str:
        before = self._decode(self._ids[: self._shown])
        return self._decode(self._ids)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
