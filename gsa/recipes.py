"""Named runs: functions returning a `TrainConfig`. `gsa train NAME` runs one.

Each recipe's docstring says what it is for; any field is overridden on the command line.
"""

from collections.abc import Callable

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


RECIPES: dict[str, Callable[[], TrainConfig]] = {"demo": demo, "tiny": tiny}
