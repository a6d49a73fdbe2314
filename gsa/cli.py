"""The command line. Options are the fields of each command's config; nothing loads before it runs.

gsa data prepare TEXT... --out SHARDS     text to token shards
gsa data corpus DEBS... --out FOLDER      packages and books to cleaned English prose
gsa data verify SHARDS...                 whether token shards are what was written
gsa train RECIPE [options]                train a model, or go on with it
gsa report RUN... [--out FILE]            draw and compare the curves of runs
gsa export RUN --out FOLDER               a model folder out of a run's newest checkpoint
gsa convert TEACHER --out FOLDER          a GSA model out of a pretrained Transformer
gsa generate MODEL --prompt TEXT          continue a text
gsa chat MODEL                            talk to a model
gsa serve MODEL [options]                 answer over HTTP, as OpenAI's API does
gsa prefill MODEL TEXT --state FILE       read a text into a file, to go on from with --state
gsa eval perplexity MODEL --data TEXT     perplexity of held-out text, by position
gsa eval tasks MODEL --suite NAME         the paper's tasks, beside its figures
gsa eval speed MODEL                      multiple choice beside lm-eval's own model
gsa eval retrieval TEACHER --data SHARDS  which layers look things up: those to keep
gsa bench ops [options]                   time the operator on this machine
gsa bench training [options]              time training steps beside rivals
gsa bench decode [options]                time decoding and prefill beside rivals
gsa bench plot RESULT...                  draw what a GPU's run measured
gsa bench tune [options]                  find the kernels' fastest launches on this GPU
gsa bench cost [MODEL...] [options]       what models cost: parameters, FLOPs, memory, hours
gsa bench distill FOLDER [options]        what a distillation costs: memory of each GPU, hours
gsa reproduce EXPERIMENT [options]        the paper's tables and figures: table1 | ... | figure4c
gsa info                                  versions, devices, implementations
"""

import argparse
import inspect
import os
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import gsa
from gsa.cli_options import add_fields, take_dict

Config = TypeVar("Config")


def data(arguments: list[str]) -> int:
    """text to token shards: gsa data prepare TEXT... --out SHARDS; prose: corpus; checks: verify"""
    chosen, rest = _subcommand("data", ("prepare", "corpus", "verify"), arguments)
    if chosen == "verify":
        from gsa.data.shards import VerifyConfig, verify

        for line in verify(_config("gsa data verify", verify, VerifyConfig, rest, ("folders",))):
            print(line, flush=True)
        return 0
    if chosen == "corpus":
        from gsa.data.corpus import CorpusConfig, build_corpus

        config = _config("gsa data corpus", build_corpus, CorpusConfig, rest, ("inputs",))
        print(build_corpus(config))
        return 0
    from gsa.data import PrepareConfig, prepare

    parser = argparse.ArgumentParser(prog="gsa data prepare", description=_summary(prepare))
    add_fields(parser, PrepareConfig, positional=("inputs",))
    print(prepare(PrepareConfig(**vars(parser.parse_args(rest)))))
    return 0


def train(arguments: list[str]) -> int:
    """train a model, or go on with it: gsa train RECIPE [options]"""
    from gsa.architectures import ARCHITECTURES, sized_alike
    from gsa.recipes import RECIPES
    from gsa.training.config import TrainConfig

    known = "\n".join(f"  {name:<8} {_summary(make)}" for name, make in RECIPES.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            f"usage: gsa train RECIPE [options]\n\nrecipes:\n{known}\n\noptions: --help after one"
        )
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; known are {', '.join(RECIPES)}")
    arch, rest = _architecture(rest)
    recipe = RECIPES[name]()
    if arch != "gsa":
        own = sized_alike(arch, recipe.model)
        recipe = replace(recipe, name=f"{name} {arch}", model=own, out=f"{recipe.out}-{arch}")
    parser = argparse.ArgumentParser(
        prog=f"gsa train {name}",
        description=f"{inspect.getdoc(RECIPES[name])}\n\nAn interrupted run goes on when the same "
        "command is given again.\nKeys of GSAConfig: --model.KEY VALUE, such as "
        "--model.num_slots 32. Here:\n  "
        + "\n  ".join(f"--model.{key} {value}" for key, value in recipe.model.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_fields(parser, TrainConfig, defaults=recipe)
    resume = "auto (newest good checkpoint), never, or the folder of a checkpoint [auto]"
    parser.add_argument("--resume", default="auto", help=resume)
    about = f"another architecture with as many parameters: {', '.join(ARCHITECTURES)} [gsa]"
    parser.add_argument("--arch", metavar="NAME", default=argparse.SUPPRESS, help=about)
    model, rest = take_dict(rest, "model")
    given = vars(parser.parse_args(rest))
    chosen = given.pop("resume")
    if given.get("init") and arch != "gsa":
        raise ValueError(f"arch: expected none with init (its folder has a config), got {arch}")
    config = replace(recipe, **given, model=model if given.get("init") else recipe.model | model)
    from gsa.training.loop import train as run

    result = run(config, resume=chosen, command="gsa " + shlex.join(["train", *arguments]))
    return 130 if result.signal == signal.SIGINT else 0


def _architecture(arguments: list[str]) -> tuple[str, list[str]]:
    """(what --arch says, the other arguments)"""
    parser = argparse.ArgumentParser(prog="gsa train", add_help=False, allow_abbrev=False)
    parser.add_argument("--arch", default="gsa")
    known, rest = parser.parse_known_args(arguments)
    return known.arch, rest


def distill(arguments: list[str]) -> int:
    """teach a converted model what its teacher knows: gsa distill STUDENT --data D --out RUN"""
    from gsa.conversion import DistillConfig
    from gsa.conversion import distill as run

    config = _config("gsa distill", run, DistillConfig, arguments, ("student",))
    result = run(config, command="gsa " + shlex.join(["distill", *arguments]), say=print)
    return _unfinished(result.signal)


def report(arguments: list[str]) -> int:
    """draw and compare the curves of runs: gsa report RUN... [--out FILE]"""
    from gsa.training.comparison import ReportConfig, compare_runs

    print(compare_runs(_config("gsa report", compare_runs, ReportConfig, arguments, ("runs",))))
    return 0


def export(arguments: list[str]) -> int:
    """a model folder out of a checkpoint, also while a run goes on: gsa export RUN --out FOLDER"""
    from gsa.training.export_run import ExportConfig, export_run

    print(export_run(_config("gsa export", export_run, ExportConfig, arguments, ("source",))))
    return 0


def convert(arguments: list[str]) -> int:
    """a GSA model out of a pretrained Transformer: gsa convert TEACHER --out FOLDER"""
    from gsa.conversion import ConvertConfig
    from gsa.conversion import convert as run

    model, rest = take_dict(arguments, "model")
    parser = argparse.ArgumentParser(
        prog="gsa convert",
        description=f"{_summary(run)} Keys of GSAConfig for converted layers: --model.KEY VALUE, "
        "such as --model.scale rsqrt_key.",
        allow_abbrev=False,
    )
    add_fields(parser, ConvertConfig, positional=("teacher",))
    print(run(ConvertConfig(**vars(parser.parse_args(rest)), model=model)))
    return 0


def generate(arguments: list[str]) -> int:
    """continue a text: gsa generate MODEL --prompt TEXT"""
    from gsa.generation.config import GenerateConfig

    config = _config("gsa generate", "Continue a text.", GenerateConfig, arguments, ("model",))
    _text_alone()
    from gsa.generation.text import generate_text

    pieces = generate_text(config)
    first = next(pieces)
    print(config.prompt, end=first, flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def chat(arguments: list[str]) -> int:
    """talk to a model: gsa chat MODEL"""
    from gsa.generation.config import ChatConfig

    config = _config("gsa chat", "Talk to a model.", ChatConfig, arguments, ("model",))
    _text_alone()
    from gsa.generation.chat import chat as run

    run(config)
    return 0


def serve(arguments: list[str]) -> int:
    """answer over HTTP, as OpenAI's API does: gsa serve MODEL"""
    from gsa.generation.server import ServeConfig
    from gsa.generation.server import serve as run

    about = "Answer over HTTP, as OpenAI's API does, until SIGINT or SIGTERM."
    config = _config("gsa serve", about, ServeConfig, arguments, ("model",))
    _text_alone()
    run(config)
    return 0


def prefill(arguments: list[str]) -> int:
    """read a text into a file: gsa prefill MODEL TEXT --state FILE"""
    from gsa.generation.config import PrefillConfig

    about = "Read a text into a model's state and save that as a file."
    config = _config("gsa prefill", about, PrefillConfig, arguments, ("model", "text"))
    _text_alone()
    from gsa.generation.text import prefill_file

    print(prefill_file(config))
    return 0


def evaluate(arguments: list[str]) -> int:
    """how good a model is: gsa eval perplexity | tasks | speed | retrieval"""
    chosen, rest = _subcommand("eval", ("perplexity", "tasks", "speed", "retrieval"), arguments)
    if chosen == "retrieval":
        from gsa.conversion.retrieval import RetrievalConfig, retrieval

        about = "Find the layers of a Transformer that look things up in the text before."
        config = _config("gsa eval retrieval", about, RetrievalConfig, rest, ("model",))
        _text_alone()
        retrieval(config, command="gsa " + shlex.join(["eval", *arguments]))
        return 0
    from gsa.evaluation import PerplexityConfig, SpeedConfig, TasksConfig

    if chosen == "tasks":
        from gsa.evaluation.tasks import run_tasks

        config = _config("gsa eval tasks", run_tasks, TasksConfig, rest, ("model",))
        _text_alone()
        run_tasks(config)
        return 0
    if chosen == "speed":
        from gsa.evaluation.speed import speed

        config = _config("gsa eval speed", speed, SpeedConfig, rest, ("model",))
        _text_alone()
        speed(config)
        return 0
    from gsa.evaluation.perplexity import perplexity

    config = _config("gsa eval perplexity", perplexity, PerplexityConfig, rest, ("model",))
    _text_alone()
    perplexity(config)
    return 0


def _text_alone() -> None:
    """Text alone is wanted, not how the weights were read."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def bench(arguments: list[str]) -> int:
    """time or cost things: gsa bench ops | plot | tune | training | decode | cost | distill"""
    known = ("ops", "plot", "tune", "cost", "training", "decode", "distill")
    chosen, rest = _subcommand("bench", known, arguments)
    if chosen == "plot":
        from gsa.benchmark.plot import PlotConfig, bench_plot

        print(bench_plot(_config("gsa bench plot", bench_plot, PlotConfig, rest, ("results",))))
        return 0
    if chosen == "tune":
        from gsa.benchmark.tune import TuneConfig, bench_tune

        bench_tune(_config("gsa bench tune", bench_tune, TuneConfig, rest))
        return 0
    if chosen == "cost":
        from gsa.benchmark.model_cost import CostConfig, bench_cost

        bench_cost(
            _config("gsa bench cost", bench_cost, CostConfig, rest, ("models",)), *_named_models()
        )
        return 0
    if chosen == "distill":
        from gsa.benchmark.distill_cost import DistillCostConfig, bench_distill

        bench_distill(
            _config("gsa bench distill", bench_distill, DistillCostConfig, rest, ("student",))
        )
        return 0
    if chosen == "training":
        from gsa.benchmark.training import BenchTrainingConfig, bench_training

        config = _config("gsa bench training", bench_training, BenchTrainingConfig, rest)
        bench_training(config, *_named_models())
        return 0
    if chosen == "decode":
        from gsa.benchmark.decode import BenchDecodeConfig, bench_decode

        config = _config("gsa bench decode", bench_decode, BenchDecodeConfig, rest)
        bench_decode(config, *_named_models())
        return 0
    from gsa.benchmark.device import bench_device

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--device", default="auto")
    if bench_device(first.parse_known_args(rest)[0].device) == "cuda":
        from gsa.benchmark.ops_gpu import BenchGPUConfig, bench_ops_gpu

        bench_ops_gpu(_config("gsa bench ops", bench_ops_gpu, BenchGPUConfig, rest))
    else:
        from gsa.benchmark.ops import BenchOpsConfig, bench_ops

        bench_ops(_config("gsa bench ops", bench_ops, BenchOpsConfig, rest))
    return 0


def _named_models() -> tuple[dict[str, dict[str, Any]], dict[str, Callable[..., Any]]]:
    """(recipes, architectures) for the benches, which know neither."""
    from gsa.architectures import ARCHITECTURES, sized_alike
    from gsa.recipes import RECIPES

    recipes = {name: make().model for name, make in RECIPES.items()}
    return recipes, {name: partial(sized_alike, name) for name in ARCHITECTURES}


def reproduce(arguments: list[str]) -> int:
    """the paper's experiments: gsa reproduce table1 | ... | figure4c"""
    from gsa.experiments.commands import EXPERIMENTS

    chosen, rest = _subcommand("reproduce", tuple(EXPERIMENTS), arguments)
    command = "gsa " + shlex.join(["reproduce", *arguments])
    config_class, run = EXPERIMENTS[chosen]
    _text_alone()
    return _unfinished(
        run(_config(f"gsa reproduce {chosen}", run, config_class, rest), command=command)
    )


def _unfinished(stopped: int) -> int:
    """As shells say that a signal ended a command: what comes after it is not to begin."""
    return 128 + stopped if stopped else 0


def info(arguments: list[str]) -> int:
    """versions, devices, threads, and the implementation that "auto" takes"""
    parser = argparse.ArgumentParser(prog="gsa info", description=info.__doc__)
    parser.parse_args(arguments)
    import torch

    from gsa.ops import describe_impl
    from gsa.training.environment import environment

    for name, value in environment().items():
        print(f"{name:<14}{'not installed' if value is None else value}")
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for device in devices:
        chosen, reason = describe_impl("auto", torch.device(device))
        print(f"{'impl on ' + device:<14}{chosen}: {reason}")
    return 0


def _config(
    prog: str,
    about: Callable[..., object] | str,
    config_class: type[Config],
    arguments: list[str],
    positional: tuple[str, ...] = (),
) -> Config:
    """The config that the arguments of a command say; about: its help, or a function with it."""
    description = about if isinstance(about, str) else _summary(about)
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    add_fields(parser, config_class, positional=positional)
    return config_class(**vars(parser.parse_args(arguments)))


def _summary(function: Callable[..., object]) -> str:
    return (inspect.getdoc(function) or "").split("\n\n")[0]


def _subcommand(
    command: str, known: tuple[str, ...], arguments: list[str]
) -> tuple[str, list[str]]:
    """(the subcommand, its arguments); the help of a command itself names them, and exits."""
    if arguments and arguments[0] in known:
        return arguments[0], arguments[1:]
    if arguments and arguments[0] in ("-h", "--help"):
        print(
            f"usage: gsa {command} {' | '.join(known)}\n\n{_summary(COMMANDS[command])}\n\n"
            "options: --help after one"
        )
        raise SystemExit(0)
    got = repr(arguments[0]) if arguments else "nothing"
    expected = " or ".join(map(repr, known))
    raise ValueError(f"gsa {command}: expected {expected}, got {got}; see gsa {command} --help")


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "data": data,
    "train": train,
    "report": report,
    "export": export,
    "convert": convert,
    "distill": distill,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "prefill": prefill,
    "eval": evaluate,
    "bench": bench,
    "reproduce": reproduce,
    "info": info,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command. Exit codes: 0 done, 2 an error that its message explains, 130 Ctrl-C.

    SIGTERM and SIGUSR1: 0 from train, which saved, as schedulers expect; 143 and 138 from others.
    """
    lines = "\n".join(f"  {name:<10}{inspect.getdoc(run)}" for name, run in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="gsa",
        description=f"Gated Slot Attention: train, save and use its language models.\n\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"gated-slots {gsa.__version__}")
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="command")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.command is None:
        parser.print_help(sys.stderr)
        return 2
    from gsa.training.errors import RunError

    try:
        return COMMANDS[parsed.command](parsed.rest)
    except BrokenPipeError:  # the reader has seen enough: gsa generate ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        out_of_memory = "can't allocate memory" in str(error)  # a CPU's; a GPU's is torch's own:
        if not out_of_memory and type(error).__name__ != "OutOfMemoryError":
            raise
        what = ". ".join(str(error).split(". ")[:3])
        hint = "ask for less at once: fewer rows (with more accumulation), --recompute 1, bf16"
        print(f"error: {what}; {hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
