"""Which layers of a Transformer look things up: those to keep when the rest becomes slots.

A head that copies what was said before attends, where a question ends, to the answer where it was
stated: a retrieval head (Wu et al. 2024, "Retrieval Head Mechanistically Explains Long-Context
Factuality", arXiv 2404.15574). Here it is asked in the manner of `recall.py`, and what the layers
found are worth is seen by making all others near-sighted.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from gsa.conversion.recall import Questions, make_questions, prose_of
from gsa.conversion.teacher import open_teacher
from gsa.data import TokenShards
from gsa.model.loading import without_bars
from gsa.training.environment import environment
from gsa.training.files import check_result, write_json

NEAR, FIRST = 32, 4
"""What a near-sighted layer sees: so many tokens back, and the first of the text, on which many
heads rest when they have nothing to look for (Xiao et al. 2023, arXiv 2309.17453)."""


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """What `retrieval` is asked to do."""

    model: str
    """Folder of a Transformer that gsa convert takes."""
    data: str
    """Shard folder in its tokens: prose to put between facts and questions."""
    layers: int = 5
    """How many layers to name."""
    distance: int = 256
    """Tokens between a fact and the question about it."""
    texts: int = 24
    """Questions."""
    seed: int = 0
    """Seeds the questions."""
    out: str = ""
    """JSON file to write; empty for none."""

    def __post_init__(self) -> None:
        for name in ("model", "data"):
            if not getattr(self, name):
                raise ValueError(f"{name}: expected a non-empty string")
        for name in ("layers", "distance", "texts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Sight:
    """How a model answers while only the layers `far` see the whole text.

    right: share of questions whose answer comes first. nats: of the whole answer, the mean.
    """

    far: list[int]
    right: float
    nats: float


def retrieval(
    config: RetrievalConfig, *, command: str = "", say: Callable[[str], None] = print
) -> list[int]:
    """The layers that look things up most, most first; prints and writes what was found.

    Runs on the CPU in fp32.

    Raises:
        ValueError, FileNotFoundError: a folder that cannot be converted, shards of another
            tokenizer, more layers asked for than there are, no room for a question.
        OSError: `out` is something else, or cannot be written.
    """
    check_result(config.out, "sights", "gsa eval retrieval")
    count = open_teacher(config.model).config.num_hidden_layers
    if config.layers > count:
        raise ValueError(f"layers: expected at most {count}, got {config.layers}")
    shards = TokenShards(config.data)
    shards.require_tokenizer(config.model)
    asked = make_questions(
        shards.load_tokenizer(), prose_of(shards), (config.distance,), config.texts, config.seed
    )[0]
    with without_bars():
        model: Any = AutoModelForCausalLM.from_pretrained(
            config.model, dtype=torch.float32, attn_implementation="eager"
        )
    model.eval()
    shares = shares_of_answers(model, asked)
    best = shares.amax(1).argsort(descending=True)[: config.layers].tolist()
    say(f"What heads give to the answer, {config.distance} tokens back, as the question ends:")
    for layer in best:
        head = int(shares[layer].argmax())
        say(f"  layer {layer:2}: {shares[layer, head]:6.1%} (head {head})")
    say(f"Answers where only some layers see more than {NEAR} tokens back and the first {FIRST}:")
    sights = []
    for far in (list(range(count)), sorted(best), []):
        sights.append(answers(model, asked, far))
        name = "all layers" if len(far) == count else ", ".join(map(str, far)) or "none"
        say(f"  {name}: {sights[-1].right:.0%} right, {sights[-1].nats:.2f} nats")
    say(f"gsa convert {config.model} --keep-layers {' '.join(map(str, sorted(best)))} --out …")
    if config.out:
        found = {
            "command": command,
            "config": asdict(config),
            "environment": environment(torch.device("cpu")),
            "layers": best,
            "shares": shares.tolist(),
            "sights": [asdict(one) for one in sights],
        }
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(config.out), found)
    return best


@torch.no_grad()
def shares_of_answers(model: Any, asked: Questions) -> Tensor:
    """[layers, heads], the attention that the last token of a question pays to its answer, where
    that was stated; the mean over questions. The model attends eagerly."""
    shares: list[Tensor] = []
    for row, answer in zip(asked.ids_BT, asked.answers, strict=True):
        stated = len(row) - answer - asked.distance
        seen = model(input_ids=row[None, :-answer], output_attentions=True, use_cache=False)
        heads = [one[0, :, -1, stated - answer : stated].sum(-1) for one in seen.attentions]
        shares.append(torch.stack(heads))
    return torch.stack(shares).mean(0)


@torch.no_grad()
def answers(model: Any, asked: Questions, far: list[int]) -> Sight:
    """How a model answers while all layers but those are near-sighted."""
    right, nats = 0, 0.0
    with _near_sighted(model, far):
        for row, answer in zip(asked.ids_BT, asked.answers, strict=True):
            kept = model(input_ids=row[None], logits_to_keep=answer + 1, use_cache=False)
            logits, wanted = kept.logits[0, :-1].float(), row[-answer:]
            right += bool((logits.argmax(-1) == wanted).all())
            nats += float(F.cross_entropy(logits, wanted, reduction="sum"))
    return Sight(far=far, right=right / len(asked.answers), nats=nats / len(asked.answers))


@contextmanager
def _near_sighted(model: Any, far: list[int]) -> Iterator[None]:
    """Meanwhile the attention of other layers than those sees `NEAR` tokens and the first."""

    def narrow(module: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        x = given["hidden_states"] if "hidden_states" in given else args[0]
        query = torch.arange(x.shape[1], device=x.device)[:, None]
        key = query.T
        seen = (key <= query) & ((query - key < NEAR) | (key < FIRST))
        mask = torch.zeros(seen.shape, dtype=x.dtype, device=x.device)
        return args, given | {"attention_mask": mask.masked_fill(~seen, float("-inf"))[None, None]}

    layers = [layer for i, layer in enumerate(model.model.layers) if i not in far]
    hooks = [
        layer.self_attn.register_forward_pre_hook(narrow, with_kwargs=True) for layer in layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
