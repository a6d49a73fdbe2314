"""The run's two pages for people: curve.png and report.md."""

import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

import gsa
from gsa.data import MixedShards, TokenShards
from gsa.data.byte_tokenizer import EOS_ID, VOCAB_SIZE
from gsa.model import GSAForCausalLM
from gsa.model.loading import without_bars
from gsa.training.config import TrainConfig
from gsa.training.curves import short_number, smoothed, smoothing
from gsa.training.distributed import is_sharded
from gsa.training.errors import RunError
from gsa.training.export import export_into, write_model
from gsa.training.export_run import write_from_checkpoint
from gsa.training.files import CHECKPOINTS, write_text
from gsa.training.metrics import read_metrics

CURVE = "curve.png"
REPORT = "report.md"
_SAMPLE_TOKENS = 400


def versions() -> dict[str, str]:
    """What the numbers of a run depend on besides its settings."""
    return {
        "gated-slots": gsa.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
    }


def token_unit(shards: TokenShards | MixedShards) -> str:
    """What one token of the shards is: "byte" for the byte tokenizer, else "token"."""
    return "byte" if (shards.vocab_size, shards.eos_id) == (VOCAB_SIZE, EOS_ID) else "token"


def draw_curve(folder: Path, unit: str) -> None:
    """curve.png: training loss (faint as measured, bold smoothed) and held-out loss over tokens."""
    from matplotlib.figure import Figure

    steps, validations = read_metrics(folder)
    steps = [row for row in steps if row["loss"] is not None]
    validations = [row for row in validations if row["val_loss"] is not None]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    tokens = [row["tokens"] for row in steps]
    losses = [row["loss"] for row in steps]
    axes.plot(tokens, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    smooth = smoothed(losses, smoothing(len(losses)))
    axes.plot(tokens, smooth, color="tab:blue", label="training")
    if validations:
        at = [row["tokens"] for row in validations]
        held_out = [row["val_loss"] for row in validations]
        label = f"held out (final {held_out[-1]:.3f})"
        axes.plot(at, held_out, "o-", color="tab:orange", markersize=4, label=label)
    shown = sorted(losses)[: max(1, int(len(losses) * 0.98))]  # the first steps' height says little
    if shown:
        margin = 0.05 * (shown[-1] - shown[0]) + 0.01
        axes.set_ylim(shown[0] - margin, shown[-1] + margin)
    axes.set_xlabel(f"{unit}s seen")
    axes.set_ylabel(f"loss, nats per {unit}")
    axes.xaxis.set_major_formatter(lambda value, _: short_number(value))
    axes.grid(alpha=0.3)
    axes.legend()
    beside = folder / f".{CURVE}.incomplete"
    figure.savefig(beside, format="png", dpi=120)
    beside.replace(folder / CURVE)


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt: str, seed: int) -> str:
    """The prompt and a continuation at temperature 0.8, no longer in all than the rows trained on.

    torch's generator is left as it was.
    """
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    trained = model.config.max_position_embeddings
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model.generate(
            ids.to(model.device),
            max_new_tokens=max(1, min(_SAMPLE_TOKENS, trained - ids.shape[1])),
            do_sample=True,
            temperature=0.8,
            top_k=0,
        )
    return tokenizer.decode(out[0], skip_special_tokens=True)


def report_text(
    config: TrainConfig,
    *,
    model: Any,
    train: TokenShards | MixedShards,
    validation: TokenShards | None,
    state: dict[str, Any],
    command: str,
    continuation: str,
) -> str:
    """The text of report.md."""
    unit = token_unit(train)
    own = (p for name, p in model.named_parameters() if ".lora_" not in name)
    parameters = sum(p.numel() for p in own)
    minutes = state["seconds"] / 60
    rows = [
        ("parameters", f"{parameters:,}"),
        ("steps", f"{state['step']:,} ({state['skipped']:,} skipped: not finite, or a spike)"),
        (f"{unit}s seen", f"{state['tokens']:,} ({_epochs(train, state['tokens'])})"),
        ("training time", f"{minutes:.1f} minutes, validation apart"),
        ("speed", f"{state['tokens'] / max(state['seconds'], 1e-9):,.0f} {unit}s per second"),
    ]
    if validation is not None:
        final = f"**{state['val_loss']:.4f}** nats per {unit}, over {state['val_tokens']:,} {unit}s"
        best = f"{state['best_val_loss']:.4f} at step {state['best_val_step']:,}"
        rows += [("final held-out loss", final), ("best held-out loss on the way", best)]
    rows += list(versions().items())
    parts = [
        f"# {config.name}",
        "A Gated Slot Attention language model, trained from "
        + (f"the weights of {config.init}." if config.init else "random weights."),
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]),
        f"![loss over {unit}s seen]({CURVE})",
    ]
    if command:
        parts.append(f"Command: `{command}`")
    parts.append(f"## Training text\n\n{_sources(train, unit)}")
    if validation is not None:
        parts.append(f"## Held-out text\n\n{_sources(validation, unit)}")
    if continuation:
        parts.append(f"## A continuation\n\nOf {config.prompt!r}:\n\n{quoted(continuation)}")
    settings = config.to_dict()
    lines = [f"| {key} | {value!r} |" for key, value in settings.items() if key != "model"]
    lines += [f"| model.{key} | {value!r} |" for key, value in config.model.items()]
    parts.append("## Settings\n\n" + "\n".join(["| | |", "|---|---|", *lines]))
    return "\n\n".join(parts) + "\n"


def finish(
    folder: Path,
    *,
    config: TrainConfig,
    model: Any,
    train: TokenShards | MixedShards,
    validation: TokenShards | None,
    state: dict[str, Any],
    command: str,
) -> None:
    """Put the final model, the curve and, last, the report into the run folder.

    A sharded model is taken from the last checkpoint. RunError if there is no room; the checkpoints
    are untouched.
    """
    last = folder / CHECKPOINTS / f"step-{state['step']:08d}"
    try:
        if is_sharded(model):
            export_into(folder, lambda beside: write_from_checkpoint(beside, last))
        else:
            export_into(folder, lambda beside: write_model(beside, model, train.tokenizer_folder))
        draw_curve(folder, token_unit(train))
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{folder}: the final model could not be saved ({error}); the checkpoints are whole: "
            "make room and run the same command again"
        ) from error
    continuation = ""
    if config.prompt:
        # What was saved speaks: the model at hand may be sharded, compiled, right in autocast only.
        speaker = _load(folder, next(model.parameters()).device)
        continuation = sample(speaker, train.load_tokenizer(), config.prompt, config.seed)
    text = report_text(
        config,
        model=model,
        train=train,
        validation=validation,
        state=state,
        command=command,
        continuation=continuation,
    )
    write_text(folder / REPORT, text)


def _load(folder: Path, device: torch.device) -> Any:
    with without_bars():
        return GSAForCausalLM.from_pretrained(folder).to(device)


def _epochs(train: TokenShards | MixedShards, tokens: int) -> str:
    if isinstance(train, TokenShards):
        return f"{tokens / train.num_tokens:.2f} epochs"
    parts = zip(train.parts, train.weights, strict=True)
    passes = [f"{float(tokens * w / part.num_tokens):.2f} of {part.folder}" for part, w in parts]
    return "epochs: " + ", ".join(passes)


def _sources(shards: TokenShards | MixedShards, unit: str) -> str:
    if isinstance(shards, MixedShards):
        return "\n\n".join(
            f"{part.folder}, weight {float(weight):.4g}:\n\n{_sources(part, unit)}"
            for part, weight in zip(shards.parts, shards.weights, strict=True)
        )
    lines = [
        f"- {source['name']} ({source['tokens']:,} {unit}s"
        + (f", {source['documents']:,} documents)" if source["documents"] > 1 else ")")
        for source in shards.sources
    ]
    if len(lines) > 100:
        lines = [*lines[:100], f"- and {len(lines) - 100} more files"]
    return "\n".join(lines)


def quoted(text: str) -> str:
    # Indented code: nothing in the text can be taken for Markdown.
    return "\n".join(f"    {line}" for line in text.splitlines())
