"""The stages of a distillation: what is learned, on how many tokens, at what rates."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

Aim = Literal["align", "kl", "ce"]
Preset = Literal["default", "paper", "lora", "smoke"]
MIXERS = ".attn."
"""In the names of a token mixer's parameters."""
NEW = (".f_proj.", ".f_out.", ".g_norm.", ".g_proj.", ".feature_map.", ".share_proj.", "_conv1d.")
"""In the names of what a mixer has that its teacher's attention had not."""
MOST_TOKENS = 1e15
"""Of a stage: more than there is text, so that a slip of the keyboard is one line."""
RANK = 8
"""Of adapters."""
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage.

    objective: align, each slot layer to the teacher's attention; kl, the model to the teacher's
    next tokens; ce, the model to the text. tokens: of training. lr: the peak rate of token mixers;
    down to a tenth by a cosine. rest: the share of it for all other parameters; 0 freezes them.
    warmup: steps, at most a tenth of the stage's. lora: rank of adapters on the projections q, k, v
    and o; 0 for none. With it, nothing else is trained but gates and whatever else is new.
    """

    objective: Aim
    tokens: int
    lr: float
    rest: float
    warmup: int = 100
    lora: int = 0

    @property
    def rates(self) -> dict[str, float]:
        """As in TrainConfig."""
        if self.lora:
            return {"": 0.0, ".lora_": 1.0} | dict.fromkeys(NEW, 1.0)
        return {"": self.rest, MIXERS: 1.0} if self.rest != 1 else {}


PRESETS: dict[Preset, tuple[tuple[float, Stage], ...]] = {
    "default": (
        (0.3, Stage(objective="align", tokens=0, lr=3e-3, rest=0.0)),
        (0.4, Stage(objective="kl", tokens=0, lr=4e-4, rest=0.25)),
        (0.3, Stage(objective="ce", tokens=0, lr=3e-4, rest=1.0)),
    ),
    "paper": ((1.0, Stage(objective="ce", tokens=0, lr=3e-5, rest=1.0, warmup=1000)),),
    "lora": (
        (0.2, Stage(objective="align", tokens=0, lr=1e-3, rest=0.0, lora=RANK)),
        (0.7, Stage(objective="kl", tokens=0, lr=3e-4, rest=0.0, lora=RANK)),
        (0.1, Stage(objective="ce", tokens=0, lr=1e-4, rest=0.0, lora=RANK)),
    ),
    "smoke": (
        (0.4, Stage(objective="align", tokens=0, lr=3e-3, rest=0.0, warmup=5)),
        (0.4, Stage(objective="kl", tokens=0, lr=1e-3, rest=0.1, warmup=5)),
        (0.2, Stage(objective="ce", tokens=0, lr=3e-4, rest=1.0, warmup=5)),
    ),
}
"""Share of all tokens, and the stage.

default follows RADLADS (Goldstein et al. 2025, arXiv 2505.03005) in its stages; shares and rates
are those that a model of 135M parameters took best to of the few tried (docs/conversion.md). paper
is the finetuning of "Gated Slot Attention", §3.2, at its rate and warm-up; lora trains adapters,
as LoLCATs (Zhang et al. 2024, arXiv 2410.10254) do after their attention transfer, of their rank.
"""


def planned(preset: Preset, tokens: int) -> list[Stage]:
    """The stages of a preset on so many tokens in all."""
    return [
        replace(stage, tokens=max(1, round(share * tokens))) for share, stage in PRESETS[preset]
    ]


def parse_stage(text: str) -> Stage:
    """objective:tokens:lr:rest, or objective:tokens:lr:lora. ValueError: what was expected."""
    expected = "stages: expected objective:tokens:lr:rest, such as kl:40M:3e-4:0.3"
    parts = text.split(":")
    if len(parts) != 4 or parts[0] not in get_args(Aim):
        aims = ", ".join(get_args(Aim))
        raise ValueError(f"{expected}, with an objective among {aims}, got {text!r}")
    try:
        unit = UNITS.get(parts[1][-1:].upper(), 1)
        tokens = float(parts[1].removesuffix(parts[1][-1:] if unit > 1 else "")) * unit
        lora = RANK if parts[3] == "lora" else 0
        lr, rest = float(parts[2]), 0.0 if lora else float(parts[3])
    except ValueError:
        raise ValueError(f"{expected}, got {text!r}") from None
    if not (0.5 < tokens <= MOST_TOKENS and 0 < lr <= 1 and 0 <= rest < math.inf):
        raise ValueError(
            f"{expected}, with tokens above 0 and at most {MOST_TOKENS:g}, lr above 0 and at most "
            f"1, rest finite and at least 0, got {text!r}"
        )
    aim: Aim = parts[0]  # pyright: ignore[reportAssignmentType]
    return Stage(objective=aim, tokens=round(tokens), lr=lr, rest=rest, lora=lora)
