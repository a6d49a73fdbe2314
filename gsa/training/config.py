"""What a training run is asked to do: one frozen dataclass, checked when it is made."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Dtype = Literal["fp32", "bf16"]
Schedule = Literal["cosine", "wsd"]
OptimizerName = Literal["adamw", "muon"]

_AT_LEAST_ONE = ("seq_len", "rows", "accumulation", "steps", "keep_checkpoints", "validation_rows")
_AT_LEAST_ZERO = (
    *("warmup", "seed", "validation_interval", "checkpoint_interval", "nan_limit"),
    *("recompute", "lora"),
)

FREE_TO_CHANGE = frozenset(
    [
        "name",
        "data",
        "validation",
        "out",
        "validation_interval",
        "validation_rows",
        "checkpoint_interval",
        "keep_checkpoints",
        "nan_limit",
        "prompt",
        "recompute",
        "cuda_graph",
        "sinks",
        "device",
    ]
)
"""Fields that a resumed run may have otherwise than the run it goes on from.

They change no parameter. The folders may move; what is in them may not change, nor the weights by
which they are mixed: a checkpoint keeps fingerprints and proportions. Another device computes the
same thing, but not bit for bit.
"""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. ValueError naming the field if a value makes no sense."""

    name: str
    """Name of the run, for people."""
    data: str
    """Shard folder to train on (gsa data prepare makes one), or several with weights:
    shards/books:0.7,shards/code:0.3."""
    out: str
    """Run folder: metrics, checkpoints, curve, report and the final model."""
    validation: str = ""
    """Shard folder of held-out text; empty for none."""
    model: dict[str, Any] = field(default_factory=dict)
    """Keys of GSAConfig; vocab_size and eos_token_id come from the shards unless given."""
    init: str = ""
    """Model folder to take weights and config from; empty for random weights and `model`."""
    rates: dict[str, float] = field(default_factory=dict)
    """Factors on lr by a part of parameters' names; the longest that fits counts, 1 if none does. A
    factor of 0 leaves parameters as they are."""
    lora: int = 0
    """Rank of adapters on the projections q, k, v and o of token mixers, which are trained in their
    place and added to them in the final model; 0 for none."""
    seq_len: int = 1024
    """Tokens per row; the memory starts empty at each row and each document."""
    rows: int = 8
    """Rows per forward and backward pass, of all processes together."""
    accumulation: int = 1
    """Passes per step; the loss is the mean over the tokens of all of them."""
    steps: int = 1000
    """Optimizer steps of the whole run."""
    optimizer: OptimizerName = "adamw"
    """muon: for the matrices of linear layers but the head, the rest by AdamW; at the same lr."""
    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 3e-5
    """Learning rate at the last step."""
    schedule: Schedule = "cosine"
    """From lr to min_lr by a cosine; or wsd: lr until the last `decay` of all steps, then down."""
    decay: float = 0.2
    """Share of the steps in which wsd goes down."""
    warmup: int = 100
    """Steps of linear warm-up to lr."""
    weight_decay: float = 0.1
    """Decay of the weight matrices of linear layers; nothing else decays."""
    beta1: float = 0.9
    """AdamW's decay of the mean of gradients."""
    beta2: float = 0.95
    """AdamW's decay of the mean of squared gradients."""
    clip: float = 1.0
    """Largest norm of the whole gradient; inf for no clipping."""
    spike: float = math.inf
    """Skip a step whose gradient norm exceeds so many times the median of the last 100; inf for
    none. The first 100 steps are never skipped for that."""
    dtype: Dtype = "fp32"
    """bf16: all of the forward pass that is not kept in fp32 for a reason."""
    master_weights: bool = True
    """With bf16, keep weights and the optimizer's moments in fp32, else in bf16: a third of the
    memory, but steps below a weight's rounding are lost."""
    recompute: int = 0
    """Keep no activations within every so-manieth block, but compute them again in the backward
    pass: 1 for all blocks (least memory), 0 for none."""
    compile: bool = False
    """Compile each block with torch.compile: faster steps after minutes of compilation."""
    lean: bool = False
    """Compiled blocks keep results of matrix products and of the operator only, and compute again
    what is elementwise: less memory for a little time."""
    cuda_graph: bool = False
    """Record a forward and backward pass on the GPU, and replay it: the same numbers, faster where
    launches take longer than what they launch, as in small models. One process only."""
    seed: int = 0
    """Seeds the initial weights and the order of the rows."""
    validation_interval: int = 0
    """Steps between validations on validation_rows rows; 0 for one at the end only."""
    validation_rows: int = 32
    """Rows of each validation on the way, always the same; the last one takes all the text."""
    checkpoint_interval: int = 0
    """Steps between checkpoints; 0 for one at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    nan_limit: int = 10
    """Steps in a row that may be skipped for a loss or gradient not finite, or a spike."""
    sinks: tuple[str, ...] = ()
    """Trackers that get the metrics too: tensorboard, wandb, trackio; metrics.jsonl always does."""
    prompt: str = ""
    """The report shows how the final model continues this; empty for no sample."""
    device: str = "cpu"
    """Where to train: cpu, cuda, cuda:1, ..."""

    def __post_init__(self) -> None:
        for name in ("name", "data", "out", "device"):
            _require(name, getattr(self, name), "a non-empty string", _is_text)
        for name in ("validation", "prompt", "init"):
            _require(name, getattr(self, name), "a string", lambda value: isinstance(value, str))
        is_model = isinstance(self.model, dict) and all(isinstance(key, str) for key in self.model)
        if not is_model:
            raise ValueError(f"model: expected a dict of GSAConfig keys, got {self.model!r}")
        for part, factor in self.rates.items():
            _require(f"rates[{part!r}]", factor, "a finite number ≥ 0", _is_finite, least=0)
        for name in _AT_LEAST_ONE:
            _require(name, getattr(self, name), "an integer of at least 1", _is_int, least=1)
        for name in _AT_LEAST_ZERO:
            _require(name, getattr(self, name), "an integer of at least 0", _is_int, least=0)
        _require("lr", self.lr, "a finite number above 0", _is_finite, above=0)
        _require("clip", self.clip, "a number above 0 (inf for none)", _is_number, above=0)
        _require("spike", self.spike, "a number above 1 (inf for none)", _is_number, above=1)
        _require("decay", self.decay, "a number in (0, 1]", _is_finite, above=0)
        for name in ("min_lr", "weight_decay"):
            _require(name, getattr(self, name), "a finite number ≥ 0", _is_finite, least=0)
        for name in ("beta1", "beta2"):
            _require(name, getattr(self, name), "a number in [0, 1)", _is_finite, least=0, below=1)
        choices = {"dtype": Dtype, "schedule": Schedule, "optimizer": OptimizerName}
        for name, kinds in choices.items():
            if getattr(self, name) not in get_args(kinds):
                expected = f"one of {get_args(kinds)}"
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        for name in ("compile", "lean", "master_weights", "cuda_graph"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        self._check_together()

    def _check_together(self) -> None:
        if self.lean and not self.compile:
            raise ValueError("lean: expected false without compile, which is what it is about")
        if self.cuda_graph and not self.device.startswith("cuda"):
            raise ValueError(f"cuda_graph: expected false on device {self.device}; set device cuda")
        if self.init and self.model:
            raise ValueError(
                f"model: expected no keys with init (its folder has a config), got {self.model!r}"
            )
        for name in ("data", "validation"):
            if getattr(self, name).startswith("hf:"):
                raise ValueError(_no_stream(name, getattr(self, name)))
        if self.dtype == "fp32" and not self.master_weights:
            raise ValueError("master_weights: expected true with dtype fp32; or take dtype bf16")
        if self.decay > 1:
            raise ValueError(f"decay: expected a number in (0, 1], got {self.decay}")
        if self.seq_len < 2:
            raise ValueError(
                f"seq_len: expected at least 2 (one token predicts the next), got {self.seq_len}"
            )
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr: expected at most lr = {self.lr}, got {self.min_lr}")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup: expected fewer than steps = {self.steps}, got {self.warmup}")
        if self.validation_interval and not self.validation:
            raise ValueError(
                "validation_interval: expected 0 without a validation folder, got "
                f"{self.validation_interval}; set validation"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self)

    def fixed(self) -> dict[str, Any]:
        """The fields that a resumed run must share with the run it goes on from."""
        return {key: value for key, value in asdict(self).items() if key not in FREE_TO_CHANGE}


def _no_stream(name: str, given: str) -> str:
    return (
        f"{name}: {given} would be read as a stream while training, and a shuffled stream does not "
        "resume exactly: what its buffer held is lost, some of it seen twice. Make shards of it "
        f"first: gsa data prepare {given} --streaming --out shards/{name}; then give "
        f"--{name} shards/{name}"
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _is_finite(value: object) -> bool:
    return _is_number(value) and math.isfinite(value)  # pyright: ignore[reportArgumentType]


def _require(
    name: str, value: Any, expected: str, fits: Any, *, least=None, above=None, below=None
) -> None:
    ok = (
        fits(value)
        and (least is None or value >= least)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
