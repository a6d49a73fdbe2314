"""Text from a model's folder, as it is written.

for piece in generate_text(GenerateConfig(model="runs/demo", prompt="ROMEO:")):
    print(piece, end="", flush=True)
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from gsa.generation.config import Dtype, GenerateConfig, PrefillConfig
from gsa.generation.decoder import Decoder
from gsa.generation.prefill import Reading
from gsa.generation.sampling import Sampling
from gsa.generation.state import ModelState, check_place, fingerprint
from gsa.model import GSAForCausalLM

DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16}


def load(folder: str | Path, dtype: Dtype = "auto") -> tuple[Any, Any]:
    """(model, tokenizer) of a folder on this machine; nothing is downloaded.

    dtype: of the weights; auto as they were saved.

    FileNotFoundError without the folder, ValueError if it is no GSA model, is unfinished or
    damaged, or has no tokenizer.
    """
    path = Path(folder)
    _check_model_folder(path)
    try:
        model = GSAForCausalLM.from_pretrained(path, local_files_only=True, dtype=DTYPES[dtype])
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
    model, tokenizer = load(config.model, config.dtype)
    before = ModelState.load(config.state) if config.state else None
    prompt = tokenizer(config.prompt, add_special_tokens=before is None)["input_ids"]
    if not prompt and before is None:
        raise ValueError("prompt: expected some text: this tokenizer starts no document by itself")
    length = len(prompt) + (0 if before is None else before.tokens)
    decoder = Decoder(
        model.to(to_device(config.device)),
        capacity=length + config.max_new_tokens,
        compile=config.compile,
    )
    state = decoder.prefill(prompt, before)
    stream = TextStream(tokenizer, prompt or [state.last])
    for token in decoder.write(state, Sampling.of(config)):
        if token not in decoder.ends:
            yield stream.add(token)
    yield stream.end()


def prefill_file(config: PrefillConfig) -> str:
    """Read a text into a model's state and save that as a file; says what was read."""
    check_place(Path(config.state))
    try:
        text = Path(config.text).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{config.text}: expected text in UTF-8 ({error})") from None
    model, tokenizer = load(config.model, config.dtype)
    model.to(to_device(config.device))
    tokens = tokenizer(text)["input_ids"]
    if not tokens:
        raise ValueError(f"{config.text}: expected some text, got an empty file")
    begin = time.perf_counter()
    state = Reading(model, tokens, None, fingerprint(model)).finish()
    state.save(config.state)
    seconds = time.perf_counter() - begin
    size = Path(config.state).stat().st_size
    return f"{config.state}: {state.tokens} tokens read in {seconds:.1f} s, {size / 1e6:.2f} MB"


def to_device(name: str) -> torch.device:
    """A device by its name; ValueError if there is none such."""
    try:
        probe = torch.empty(1, device=name)
        probe.item()
        return probe.device
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(f"device: {name!r} cannot be used here ({why})") from error


MOST_HELD = 32
"""Tokens that are held back at most; a character has at most four."""


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
        if text and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            return self._give(text)
        if len(self._ids) - self._shown < MOST_HELD:
            return ""
        # No character is that long: it is no text, but for a last one that may be unfinished.
        held, self._ids = self._ids[-3:], self._ids[:-3]
        text = self._give(self._new_text())
        self._ids += held
        return text

    def _give(self, text: str) -> str:
        """Notes that all tokens so far were shown, as this text."""
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
