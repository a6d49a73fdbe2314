"""What `gsa generate`, `gsa chat` and `gsa prefill` are asked to do."""

from dataclasses import dataclass
from typing import Any, Literal

Dtype = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """What all that writes is asked. ValueError naming the field if a value makes no sense."""

    model: str
    """Folder of a GSA model: a finished run, a checkpoint, or a published one."""
    state: str = ""
    """File that gsa prefill wrote with this model: go on after its text."""
    max_new_tokens: int = 200
    """Tokens of a text at most; the end of the document stops earlier."""
    temperature: float = 0.8
    """Divides the logits before sampling: below 1 is surer, above 1 wilder."""
    top_k: int = 0
    """Sample among the k likeliest tokens only; 0 for all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together reach this probability; 1 for all."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that occurred before less likely, also in greedy text."""
    seed: int = 0
    """The same seed writes the same text."""
    greedy: bool = False
    """Always take the likeliest token; temperature, top_k, top_p and seed play no part."""
    device: str = "cpu"
    """Where to run: cpu, cuda, ..."""
    dtype: Dtype = "auto"
    """Of the weights; auto as they were saved."""
    compile: bool = False
    """On a CUDA device: compile the step first, which takes a while, for faster tokens."""

    def __post_init__(self) -> None:
        check_model(self.model)
        check_sampling(self)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(WriteConfig):
    """One continuation."""

    prompt: str = ""
    """The text to continue; with state, what follows the text that it has read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_text("prompt", self.prompt)


@dataclass(frozen=True, kw_only=True)
class ChatConfig(WriteConfig):
    """A conversation."""

    system: str = ""
    """Instructions before the conversation; needs a tokenizer with a chat template."""
    max_new_tokens: int = 500
    """Tokens of an answer at most."""
    capacity: int = 0
    """Tokens of the conversation at most, for models with softmax layers without a window; 0 for
    the config's max_position_embeddings. Others have no limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_text("system", self.system)
        if self.capacity < 0:
            raise ValueError(f"capacity: expected at least 0, got {self.capacity}")


@dataclass(frozen=True, kw_only=True)
class PrefillConfig:
    """A text to be read into a file. ValueError naming the field if a value makes no sense."""

    model: str
    """Folder of a GSA model: a finished run, a checkpoint, or a published one."""
    text: str
    """File with the text to read, UTF-8."""
    state: str
    """File to write, such as book.safetensors; an older state is replaced, no other file."""
    device: str = "cpu"
    """Where to run: cpu, cuda, ..."""
    dtype: Dtype = "auto"
    """Of the weights; auto as they were saved. Another dtype is another model to a state."""

    def __post_init__(self) -> None:
        check_model(self.model)
        if not self.state:
            raise ValueError("state: expected a file to write, got an empty string")


def check_model(folder: str) -> None:
    if not folder:
        raise ValueError("model: expected the folder of a model, got an empty string")


def check_text(name: str, text: str) -> None:
    """ValueError for bytes of a command line that were no text in its encoding."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name}: expected text in UTF-8, got {text!r}") from None


def check_sampling(settings: Any) -> None:
    """ValueError naming the field of a sampling setting that makes no sense."""
    for name, least in (("max_new_tokens", 1), ("top_k", 0)):
        value = getattr(settings, name)
        if not least <= value < 2**63:
            most = "" if value < least else " and of 64 bits"
            raise ValueError(f"{name}: expected at least {least}{most}, got {value}")
    for name in ("temperature", "repetition_penalty"):
        value = getattr(settings, name)
        if not 1e-6 <= value <= 1e6:  # beyond, logits lose their digits or overflow
            hint = "; for no chance at all use greedy" if name == "temperature" else ""
            raise ValueError(f"{name}: expected a number from 1e-6 to 1e6, got {value}{hint}")
    if not 0 < settings.top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {settings.top_p}")
    if not -(2**63) <= settings.seed < 2**63:
        raise ValueError(f"seed: expected a number of 64 bits, got {settings.seed}")
