"""What `gsa serve` is asked to do."""

import math
from dataclasses import dataclass
from pathlib import Path

from gsa.generation.config import Dtype, check_model


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """A model to be served. ValueError naming the field if a value makes no sense."""

    model: str
    """Folder of a GSA model: a finished run, a checkpoint, or a published one."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all of this machine's: give an API key then, or whoever
    reaches it may use it."""
    port: int = 8000
    """Port to listen at; 0 for any free one, which is printed."""
    name: str = ""
    """What requests call the model; empty for its folder's name."""
    states: tuple[str, ...] = ()
    """NAME=FILE of a text that gsa prefill read with this model: a further model of that name,
    whose prompts go on after the text."""
    rows: int = 8
    """Texts written at once; every step works on all of them."""
    queue: int = 64
    """Texts that may wait for a row; requests beyond that get status 429."""
    max_prompt: int = 65536
    """Tokens of a prompt at most."""
    max_tokens: int = 4096
    """Tokens that a request may ask for at most."""
    capacity: int = 0
    """Tokens of prompt and answer at most, for models with softmax layers without a window; 0 for
    the config's max_position_embeddings. Others have no limit."""
    prefix_mb: int = 1024
    """Megabytes, on the model's device, for states of prompts and answers; what a later prompt
    begins with is not read again. 0 keeps none."""
    chat_template: str = ""
    """File with a Jinja chat template, instead of the tokenizer's."""
    api_key: str = ""
    """Key that requests must bring (Authorization: Bearer KEY). Others on this machine can see it
    among the processes' arguments: api_key_file is better."""
    api_key_file: str = ""
    """File whose first line is the key."""
    grace: float = 30.0
    """Seconds that answers may still take after SIGINT or SIGTERM."""
    device: str = "cpu"
    """Where to run: cpu, cuda, ..."""
    dtype: Dtype = "auto"
    """Of the weights; auto as they were saved."""
    compile: bool = False
    """On a CUDA device: compile the step first, which takes a while, for faster tokens."""

    def __post_init__(self) -> None:
        check_model(self.model)
        for field in ("rows", "max_prompt", "max_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: expected at least 1, got {getattr(self, field)}")
        for field in ("queue", "capacity", "prefix_mb"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}: expected at least 0, got {getattr(self, field)}")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port: expected 0 to 65535, got {self.port}")
        if not (math.isfinite(self.grace) and self.grace >= 0):
            raise ValueError(f"grace: expected a number of seconds from 0, got {self.grace}")
        if self.api_key and self.api_key_file:
            raise ValueError("api_key: expected none beside api_key_file")
        self.state_files()

    @property
    def model_name(self) -> str:
        return self.name or Path(self.model).resolve().name

    def state_files(self) -> dict[str, str]:
        """Files of states by name."""
        files: dict[str, str] = {}
        for given in self.states:
            name, _, file = given.partition("=")
            if not name or not file:
                raise ValueError(f"states: expected NAME=FILE, got {given!r}")
            if name in files or name == self.model_name:
                raise ValueError(f"states: expected other names for each, got {name!r} twice")
            files[name] = file
        return files

    def key(self) -> str:
        """The API key; "" for none. ValueError if its file has none or it cannot be sent."""
        key = self.api_key
        if self.api_key_file:
            lines = Path(self.api_key_file).read_text(encoding="utf-8").splitlines()
            key = lines[0].strip() if lines else ""
            if not key:
                raise ValueError(f"{self.api_key_file}: expected a key in the first line, got none")
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise ValueError("api_key: expected printable ASCII characters without spaces")
        return key
