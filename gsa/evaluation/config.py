"""What `gsa eval` is asked to do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Dtype = Literal["auto", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What every evaluation is asked. ValueError naming the field if a value makes no sense."""

    model: str
    """Folder of a model with its tokenizer: one of ours, of any architecture, or any causal
    language model of transformers."""
    out: str = ""
    """JSON file to write, with a Markdown table of the same name beside it; empty for none."""
    rows: int = 8
    """Texts read at once."""
    length: int = 0
    """Tokens that the model sees at most; 0 for the config's max_position_embeddings."""
    device: str = "cpu"
    """Where to run: cpu, cuda, ..."""
    dtype: Dtype = "auto"
    """Of the weights; auto as they were saved."""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model: expected the folder of a model, got an empty string")
        if self.out and Path(self.out).suffix != ".json":
            raise ValueError(f"out: expected the name of a .json file, got {self.out!r}")
        if self.rows < 1:
            raise ValueError(f"rows: expected at least 1, got {self.rows}")
        if self.length < 0 or self.length == 1:
            raise ValueError(f"length: expected at least 2, or 0, got {self.length}")


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig(EvalConfig):
    """Perplexity of held-out text."""

    data: str
    """Shards of gsa data prepare, or text: a .txt, .jsonl or .parquet file or a folder of those."""
    stride: int = 0
    """Tokens from the start of one window to that of the next, each token being scored in the first
    window that has it; 0 for as many as length: rows that do not overlap."""
    whole: bool = False
    """Read each document in one pass, however long: the memory is carried on. GSAConfig models."""
    max_tokens: int = 0
    """Stop after about so many scored tokens; 0 for all."""
    text_key: str = "text"
    """The key (jsonl) or column (parquet) that holds the text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data:
            raise ValueError("data: expected shards or text, got an empty string")
        if self.stride < 0:
            raise ValueError(f"stride: expected at least 1, or 0, got {self.stride}")
        if self.length and self.stride > self.length:
            raise ValueError(
                f"stride: expected at most length = {self.length}, got {self.stride}: tokens "
                "between two windows would be left out"
            )
        if self.whole and (self.stride or self.length):
            raise ValueError("whole: expected neither length nor stride with it")
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens: expected at least 0, got {self.max_tokens}")


@dataclass(frozen=True, kw_only=True)
class TasksConfig(EvalConfig):
    """Tasks of lm-eval and of our own (package extra eval)."""

    suite: str = ""
    """Tasks, shots and the paper's figures beside: commonsense, recall, t2r, long or mmlu."""
    tasks: tuple[str, ...] = ()
    """Tasks or groups by their names, with their own shots; with a suite only these of it."""
    data_dir: str = ""
    """Folder with TASK/SPLIT.jsonl to read instead of the Hugging Face hub."""
    limit: int = 0
    """The first so many examples of each task only, to try things; 0 for all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.suite and not self.tasks:
            raise ValueError("suite: expected a suite, or tasks, got neither")
        if self.limit < 0:
            raise ValueError(f"limit: expected at least 0, got {self.limit}")


@dataclass(frozen=True, kw_only=True)
class SpeedConfig(EvalConfig):
    """Multiple choice through forked states beside lm-eval's HFLM, on made-up questions."""

    questions: int = 8
    """How many."""
    choices: int = 4
    """Of each question."""
    context: int = 1024
    """Tokens before the choices."""
    answer: int = 8
    """Tokens of a choice."""
    shots: int = 0
    """Of the context, tokens that all questions have in common, like examples before them."""
    seed: int = 0
    """Of the questions."""
    turns: int = 3
    """Times that each of the two scores them all, by turns; the fastest counts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("questions", "choices", "context", "answer", "turns"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.shots < self.context:
            raise ValueError(
                f"shots: expected less than context = {self.context}, got {self.shots}"
            )
