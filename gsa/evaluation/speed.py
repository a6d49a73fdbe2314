"""`gsa eval speed`: multiple choice through forked states, beside lm-eval's HFLM."""

import contextlib
import importlib.util
import io
import time
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from gsa.evaluation.config import SpeedConfig
from gsa.evaluation.models import is_ours, model_facts, open_model, open_tokenizer
from gsa.evaluation.report import check_out, markdown, write_report
from gsa.training.environment import environment


def speed(config: SpeedConfig) -> dict[str, Any]:
    """Time multiple choice through forked states beside lm-eval's HFLM, and compare the numbers.

    Questions are random tokens, as many rows at once for both. Prints and writes a table. Raises
    before the weights are read: ImportError without lm-eval, ValueError for a folder without a
    model; after that ValueError for a model of transformers, which has no state to fork.
    """
    check_out(config.out)
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError('gsa eval speed needs lm-eval; pip install "gated-slots[eval]"')
    tokenizer = open_tokenizer(config.model)
    model = open_model(config)
    if not is_ours(model):
        raise ValueError(f"model: expected a GSAConfig model, got {model.config.model_type}")
    from lm_eval.models import huggingface

    from gsa.evaluation.harness import StateLM

    length = config.length or config.context + config.answer
    shared = {"max_length": length}
    hflm: Any = huggingface.HFLM  # its base class hides what it takes
    both: dict[str, Any] = {
        "forked states": StateLM(model, tokenizer, rows=config.rows, **shared),
        "HFLM": hflm(pretrained=model, tokenizer=tokenizer, batch_size=config.rows, **shared),
    }
    asked = questions(config, model.config.vocab_size)
    seconds: dict[str, list[float]] = {name: [] for name in both}
    scores: dict[str, list[tuple[float, bool]]] = {}
    for lm in both.values():
        lm._loglikelihood_tokens(asked[: config.choices], disable_tqdm=True)
    for _ in range(config.turns):
        for name, lm in both.items():
            with contextlib.redirect_stderr(io.StringIO()):
                start = time.perf_counter()
                scores[name] = lm._loglikelihood_tokens(asked, disable_tqdm=True)
                seconds[name].append(time.perf_counter() - start)
    ours, theirs = (torch.tensor(scores[name], dtype=torch.float64) for name in both)
    fastest = {name: min(turns) for name, turns in seconds.items()}
    document = {
        "evaluation": "speed",
        "asked": asdict(config),
        "model": model_facts(model, config.model),
        "environment": environment(model.device) | {"lm_eval": version("lm_eval")},
        "seconds": seconds,
        "times_faster": fastest["HFLM"] / fastest["forked states"],
        "requests": len(asked),
        "largest_difference_nats": float((ours[:, 0] - theirs[:, 0]).abs().max()),
        "largest_relative_difference": float(
            ((ours[:, 0] - theirs[:, 0]) / theirs[:, 0]).abs().max()
        ),
        "same_greedy": bool((ours[:, 1] == theirs[:, 1]).all()),
    }
    write_report(config.out, document, speed_table(document))
    return document


def questions(
    config: SpeedConfig, vocab_size: int
) -> list[tuple[tuple[str, str], list[int], list[int]]]:
    """Requests as lm-eval's models take them: texts (only names here), context, continuation."""
    draw = torch.Generator().manual_seed(config.seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(vocab_size, (count,), generator=draw).tolist()

    head, found = tokens(config.shots), []
    for question in range(config.questions):
        context = head + tokens(config.context - config.shots)
        for choice in range(config.choices):
            texts = (f"question {question}", f"choice {choice}")
            found.append((texts, context, tokens(config.answer)))
    return found


def speed_table(document: dict[str, Any]) -> str:
    """The result as Markdown."""
    asked = document["asked"]
    lines = [["", "seconds", "slowest", "requests per second"]]
    for name, turns in document["seconds"].items():
        rate = document["requests"] / min(turns)
        lines.append([name, f"{min(turns):.3f}", f"{max(turns):.3f}", f"{rate:.1f}"])
    return (
        f"{asked['model']}: {asked['questions']} questions of {asked['context']} tokens, "
        f"{asked['shots']} of them in common, {asked['choices']} choices of {asked['answer']}; "
        f"{document['environment']['device']}, {document['environment']['threads']} threads\n\n"
        f"{markdown(lines)}\n\n"
        f"{document['times_faster']:.2f} times as fast. Log-likelihoods differ by at most "
        f"{document['largest_difference_nats']:.1e} nats "
        f"({document['largest_relative_difference']:.1e} of them)."
    )
