"""Named runs: functions returning a `TrainConfig`. `gsa train NAME` runs one.

Each recipe's docstring says what it is for; any field is overridden on the command line. The folder
`data` of those from 34m on is a place for your own shards: `gsa data prepare TEXT --out
runs/data/train --tokenizer mistral` (or FOLDER), or give another with --data.
"""

from collections.abc import Callable
from typing import Any

from gsa.training.config import TrainConfig


def demo() -> TrainConfig:
    """A byte-level model of about a million parameters: minutes on two CPU cores."""
    return TrainConfig(
        name="demo",
        data="runs/demo-data/train",
        validation="runs/demo-data/valid",
        out="runs/demo",
        model={
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_heads": 4,
            "num_slots": 32,
            "intermediate_size": 384,
            "use_short_conv": True,
            "tie_word_embeddings": True,
        },
        seq_len=512,
        rows=4,
        steps=700,
        lr=4e-3,
        min_lr=2e-4,
        warmup=50,
        validation_interval=140,
        validation_rows=32,
        checkpoint_interval=350,
        prompt="ROMEO:",
    )


def tiny() -> TrainConfig:
    """A few thousand parameters for a few seconds: to see that everything works."""
    return TrainConfig(
        name="tiny",
        data="runs/tiny-data",
        out="runs/tiny",
        model={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 2,
            "num_slots": 8,
            "intermediate_size": 64,
            "tie_word_embeddings": True,
        },
        seq_len=64,
        rows=4,
        steps=60,
        lr=1e-2,
        min_lr=1e-3,
        warmup=5,
        checkpoint_interval=20,
    )


def _pretraining(
    name: str,
    model: dict[str, Any],
    *,
    tokens: float,
    rows: int,
    accumulation: int,
    lr: float = 3e-4,
) -> TrainConfig:
    """A language model from scratch on one GPU, as in the paper ("Gated Slot Attention", App. C.1).

    The paper's: AdamW with weight decay 0.01, warm-up over the first hundredth of the tokens, a
    cosine to a tenth of the rate; at 1.3B and 2.7B its rate of 3e-4 too. Not said there and taken
    from MoM (arXiv 2502.13685, App. C), which says it follows the same setup: rows of 2048 tokens,
    gradients clipped at 1.0. Ours: betas 0.9 and 0.95, matrix products in bf16, rows of a pass.

    The vocabulary is that of the data's tokenizer (the paper's: Mistral-7B-v0.1, 32000). A step
    reads seq_len · rows · accumulation tokens: with less memory halve rows and double accumulation.
    """
    seq_len = 2048
    steps = round(tokens / (seq_len * rows * accumulation))
    return TrainConfig(
        name=name,
        data="runs/data/train",
        out=f"runs/{name}",
        model=model,
        seq_len=seq_len,
        rows=rows,
        accumulation=accumulation,
        steps=steps,
        lr=lr,
        min_lr=lr / 10,
        warmup=round(steps / 100),
        weight_decay=0.01,
        beta1=0.9,
        beta2=0.95,
        clip=1.0,
        dtype="bf16",
        compile=True,
        lean=True,
        checkpoint_interval=500,
        device="cuda",
    )


def small_34m() -> TrainConfig:
    """34M parameters on 0.7B tokens: the first model worth a GPU; batches of 0.13M tokens.

    The shape, the rate of 1e-3, batch and length of the run (20 tokens per parameter) are ours, not
    the paper's, and untested. 34.4M parameters at a vocabulary of 32000, 12.3M of them embeddings,
    tied to the head.
    """
    model = {
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_heads": 3,
        "num_slots": 64,
        "tie_word_embeddings": True,
    }
    return _pretraining("34m", model, tokens=0.7e9, rows=16, accumulation=4, lr=1e-3)


def small_125m() -> TrainConfig:
    """125M parameters on 2.5B tokens, to compare settings; batches of 0.26M tokens.

    The shape, the rate of 6e-4, batch and length of the run (20 tokens per parameter) are ours, not
    the paper's, and untested. 125.8M parameters at a vocabulary of 32000, 24.6M of them embeddings,
    tied to the head.
    """
    model = {
        "hidden_size": 768,
        "num_hidden_layers": 14,
        "num_heads": 3,
        "num_slots": 64,
        "tie_word_embeddings": True,
    }
    return _pretraining("125m", model, tokens=2.5e9, rows=16, accumulation=8, lr=6e-4)


def ablation_340m() -> TrainConfig:
    """The size of the paper's ablations, 10B tokens; batches of 0.5M tokens.

    Tokens and 64 slots are the paper's, which gives no other sizes: layers, width and heads are
    those that flame's gsa_340M.json has. Rate and warm-up follow the paper's larger runs; the batch
    is ours. 380.2M parameters at a vocabulary of 32000, 314.6M without embeddings and head.
    """
    model = {"hidden_size": 1024, "num_hidden_layers": 24, "num_heads": 4, "num_slots": 64}
    return _pretraining("340m", model, tokens=10e9, rows=16, accumulation=16)


def paper_1_3b() -> TrainConfig:
    """The paper's 1.3B on 100B tokens, batches of 2M tokens; it took 32 H800 a day.

    Shape, tokens, rate and warm-up are the paper's, the batch is MoM's (arXiv 2502.13685, App. C,
    at 1.3B). 1.377B parameters at a vocabulary of 32000.
    """
    model = {"hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 4, "num_slots": 64}
    return _pretraining("1.3b", model, tokens=100e9, rows=8, accumulation=128)


def paper_2_7b() -> TrainConfig:
    """The paper's 2.7B on 100B tokens, batches of 2M tokens; it took 32 H800 two days.

    Shape, tokens, rate and warm-up are the paper's, the output norm without weights is that of
    fla-hub/gsa-2.7B-100B; the batch is what MoM (arXiv 2502.13685, App. C) says of 1.3B. 2.728B
    parameters at a vocabulary of 32000.
    """
    model = {
        "hidden_size": 2560,
        "num_hidden_layers": 32,
        "num_heads": 5,
        "num_slots": 64,
        "elementwise_affine": False,
    }
    return _pretraining("2.7b", model, tokens=100e9, rows=4, accumulation=256)


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "tiny": tiny,
    "34m": small_34m,
    "125m": small_125m,
    "340m": ablation_340m,
    "1.3b": paper_1_3b,
    "2.7b": paper_2_7b,
}
