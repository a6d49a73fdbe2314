"""The proof that a teacher was understood: with every layer kept, the logits are the teacher's.

Teacher and student run side by side, layer by layer, so that no more than one layer is in memory.
Both are compared with the teacher in fp64; in fp32 the student may be off by twice what the
teacher itself is, and by the rounding of one number.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gsa.conversion.teacher import EMBEDDINGS, HEAD, Teacher
from gsa.layers import RMSNorm, TokenLayout
from gsa.model import GSAConfig
from gsa.model.modeling import GSABlock

_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far fp32 logits are from the teacher's in fp64: ‖a − b‖ / ‖b‖, and largest over largest.

    teacher: of the teacher itself. student: of the student with every layer kept.
    """

    tokens: int
    teacher: tuple[float, float]
    student: tuple[float, float]

    @property
    def holds(self) -> bool:
        eps = torch.finfo(torch.float32).eps
        both = zip(self.student, self.teacher, strict=True)
        return all(ours <= 2 * theirs + eps for ours, theirs in both)


@torch.no_grad()
def compare_kept(teacher: Teacher, config: GSAConfig, tokens: int, seed: int) -> Agreement:
    """Compares teacher and student on random tokens.

    Args:
        config: of the student with every layer kept.
        tokens: how many, in one row.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (tokens,), generator=generator).tolist()
    x_TD = torch.cat([teacher.rows(EMBEDDINGS, i, i + 1) for i in ids])
    exact, theirs, ours = x_TD[None].double(), x_TD[None].float(), x_TD[None].float()
    layers = _TeacherLayers(teacher)
    layout = TokenLayout.of_rows(tokens, x_TD.device)
    for layer in range(config.num_hidden_layers):
        weights = block_weights(teacher, layer)
        exact = layers.run(layer, weights, exact)
        theirs = layers.run(layer, weights, theirs)
        ours = run_student(teacher, config, layer, weights, ours, layout)
    weight = teacher.read(["model.norm.weight"])["model.norm.weight"]
    exact, theirs = layers.norm(weight, exact), layers.norm(weight, theirs)
    norm = RMSNorm(config.hidden_size, config.norm_eps)
    norm.weight = nn.Parameter(weight.float())
    head = EMBEDDINGS if config.tie_word_embeddings else HEAD
    return _compare_logits(teacher, head, exact, theirs, norm(ours))


def check_kept(teacher: Teacher, config: GSAConfig, tokens: int, seed: int) -> Agreement:
    """The same; ValueError unless they agree."""
    found = compare_kept(teacher, config, tokens, seed)
    if not found.holds:
        raise ValueError(
            f"teacher: with every layer kept, logits on {tokens} tokens should be off by at most "
            f"twice the teacher's own rounding ({found.teacher[0]:.1e}), but are by "
            f"{found.student[0]:.1e}: its config.json asks for something that is not understood "
            "here. Please report it with that file; check_tokens 0 converts regardless"
        )
    return found


class _TeacherLayers:
    """Single layers of the teacher, run by transformers' own code; weights are there meanwhile."""

    def __init__(self, teacher: Teacher):
        self.teacher = teacher
        self.models: dict[str | None, Any] = {}

    def run(self, layer: int, weights: dict[str, Tensor], x_BTD: Tensor) -> Tensor:
        """What a layer makes of x, in x's dtype."""
        model = self._model(layer)
        wide = {name: weight.to(x_BTD.dtype) for name, weight in weights.items()}
        model.layers[0].load_state_dict(wide, assign=True)
        norm, model.norm = model.norm, nn.Identity()
        try:
            return model(inputs_embeds=x_BTD, use_cache=False).last_hidden_state
        finally:
            model.norm = norm
            model.layers[0].to("meta")

    def norm(self, weight: Tensor, x_BTD: Tensor) -> Tensor:
        """What the last norm makes of x."""
        norm = self._model(0).norm
        norm.load_state_dict({"weight": weight.to(x_BTD.dtype)}, assign=True)
        return norm(x_BTD)

    def _model(self, layer: int) -> Any:
        """A model of one layer of that kind, its weights to come."""
        kinds = getattr(self.teacher.config, "layer_types", None)
        kind = kinds[layer] if kinds else None
        if kind not in self.models:
            from transformers import AutoModel

            config = copy.deepcopy(self.teacher.config)
            config.num_hidden_layers = config.vocab_size = 1
            config.pad_token_id = None
            if kinds:
                config.layer_types = [kind]
            with torch.device("meta"):
                model = AutoModel.from_config(
                    config, dtype=torch.float32, attn_implementation="sdpa"
                )
            model.rotary_emb = type(model.rotary_emb)(config=config)  # its buffers are computed
            self.models[kind] = model.eval()
        return self.models[kind]


def block_weights(teacher: Teacher, layer: int) -> dict[str, Tensor]:
    """A layer's weights, by names without the layer."""
    prefix = f"model.layers.{layer}."
    names = [name for name in teacher.weights if name.startswith(prefix)]
    return {name.removeprefix(prefix): w for name, w in teacher.read(names).items()}


def run_student(
    teacher: Teacher,
    config: GSAConfig,
    layer: int,
    weights: dict[str, Tensor],
    x_BTD: Tensor,
    layout: TokenLayout,
) -> Tensor:
    with torch.device("meta"):
        block = GSABlock(config, layer)
    prefix = f"model.layers.{layer}."
    named = {
        (teacher.family.to_student(prefix + name) or name).removeprefix(prefix): weight.float()
        for name, weight in weights.items()
    }
    block.load_state_dict(named, assign=True)
    return block.eval()(x_BTD, layout)


def _compare_logits(
    teacher: Teacher, head: str, exact: Tensor, theirs: Tensor, ours: Tensor
) -> Agreement:
    """Multiplies by the head, some rows at a time."""
    parts = []
    for start in range(0, teacher.weights[head].shape[0], _ROWS):
        rows = teacher.rows(head, start, start + _ROWS)
        wide, narrow = rows.double(), rows.float()
        logits = F.linear(exact, wide)
        parts.append([logits, *(F.linear(x, narrow) - logits for x in (theirs, ours))])
    size, off_theirs, off_ours = (_Size.of(part) for part in zip(*parts, strict=True))
    return Agreement(
        tokens=exact.shape[1],
        teacher=(off_theirs.norm / size.norm, off_theirs.largest / size.largest),
        student=(off_ours.norm / size.norm, off_ours.largest / size.largest),
    )


@dataclass(frozen=True)
class _Size:
    norm: float
    largest: float

    @staticmethod
    def of(parts: Iterable[Tensor]) -> "_Size":
        parts = list(parts)
        norm = sum(part.square().sum().item() for part in parts) ** 0.5
        return _Size(norm, max(part.abs().max().item() for part in parts))
