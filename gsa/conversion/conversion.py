"""`gsa convert`: a Transformer's folder in, a GSA model's out, whole or not at all.

    print(convert(ConvertConfig(teacher="models/SmolLM2-135M", out="models/slots")))

Weights go from file to file, one of the teacher's at a time.
"""

import shutil
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import gsa
from gsa.conversion.check import Agreement, check_kept
from gsa.conversion.config import ConvertConfig
from gsa.conversion.initial import GATE, check_new, new_weight
from gsa.conversion.student import Plan, make_plan, student_config, student_dtype
from gsa.conversion.teacher import CONFIG, INDEX, ONE_FILE, Teacher, open_teacher
from gsa.conversion.tokenizer import take_over_tokenizer, tokenizer_files
from gsa.training.errors import RunError
from gsa.training.files import sha256, write_json
from gsa.training.lock import made_whole

REPORT = "conversion.json"
GENERATION = "generation_config.json"
KEYS = "attn.k_proj.weight"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was made.

    report: the contents of conversion.json: teacher, options, what was copied, what is new.
    """

    folder: Path
    report: dict[str, Any]

    def __str__(self) -> str:
        layers, check = self.report["layers"], self.report["check"]
        target = self.report["options"]["target"]
        lines = [
            f"{self.folder}: {len(layers['converted'])} layers of {target}, {len(layers['kept'])} "
            f"kept; {len(self.report['copied'])} weights copied, {len(self.report['new'])} new"
        ]
        if check is not None:
            lines.append(
                f"with every layer kept, logits on {check['tokens']} tokens are off by "
                f"{check['student'][0]:.1e} in fp32, the teacher's own by {check['teacher'][0]:.1e}"
            )
        if not self.report["tokenizer"]:
            lines.append("the teacher's folder has no tokenizer, so neither has this one")
        return "\n".join(lines)


def convert(config: ConvertConfig) -> Conversion:
    """Make a GSA model out of a pretrained Transformer: its weights copied, gates and norms new.

    Embeddings, norms, MLPs, head and all of attention but the softmax are the teacher's; the
    result has to be trained before it is a good language model, unless every layer is kept. A
    target besides gsa gives one of the paper's rivals in the same form.

    Raises before anything is written: FileNotFoundError, ValueError for a teacher that is missing,
    of another family, quantised, incomplete or not understood, or options that do not fit it;
    FileExistsError if `out` is in use. While writing: RunError; `out` is then as it was before.
    """
    out = Path(config.out)
    _check_free(out)
    teacher = open_teacher(config.teacher)
    if config.keep_all:
        layers = tuple(range(teacher.config.num_hidden_layers))
        config = replace(config, keep_all=False, keep_layers=layers)
    plan = make_plan(teacher, student_config(teacher, config))
    check_new(plan, config)
    tokenizer = tokenizer_files(teacher)
    _check_room(out, teacher)
    checked = _check(teacher, config)
    report = _report(teacher, plan, config, checked, tokenizer)
    try:
        with made_whole(out) as partial:
            _write_weights(partial, teacher, plan, config)
            _write_configs(partial, teacher, plan)
            take_over_tokenizer(teacher, tokenizer, partial)
            write_json(partial / REPORT, report)
            _check_free(out)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{out}: could not be written ({error}); it is as it was before") from error
    return Conversion(folder=out, report=report)


def output_files(teacher: Teacher, plan: Plan) -> dict[str, dict[str, str | None]]:
    """File by file, the student's weights in it and the teacher's names of those; None is new.

    What the teacher has in one file stays together. What is new to a layer stands beside its keys.
    """
    sources = plan.copied
    by_file: dict[str, dict[str, str | None]] = {file: {} for file in teacher.files}
    for name, source in sources.items():
        by_file[teacher.weights[source].file][name] = source
    for name in plan.new:
        keys = f"model.layers.{name.split('.')[2]}.{KEYS}"
        by_file[teacher.weights[sources[keys]].file][name] = None
    contents = [content for content in by_file.values() if content]
    if len(contents) == 1:
        return {ONE_FILE: contents[0]}
    n = len(contents)
    return {f"model-{i:05}-of-{n:05}.safetensors": part for i, part in enumerate(contents, 1)}


def _write_weights(folder: Path, teacher: Teacher, plan: Plan, config: ConvertConfig) -> None:
    files = output_files(teacher, plan)
    weight_map, total = {}, 0
    dtype = getattr(torch, student_dtype(teacher))
    for file, content in files.items():
        sources = {name: source for name, source in content.items() if source is not None}
        read = teacher.read(sources.values())
        weights: dict[str, Tensor] = {name: read[source] for name, source in sources.items()}
        for name in content.keys() - sources.keys():
            keys = weights.get(name.replace(GATE, KEYS))
            weights[name] = new_weight(name, plan, config, keys).to(dtype)
        save_file(weights, folder / file, metadata={"format": "pt"})
        # safetensors makes files for their owner alone; a model is to be as readable as any file.
        (folder / file).chmod(folder.stat().st_mode & 0o666)
        weight_map |= dict.fromkeys(sorted(content), file)
        total += sum(weight.nbytes for weight in weights.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / INDEX, index)


def _write_configs(folder: Path, teacher: Teacher, plan: Plan) -> None:
    plan.config.architectures = [type(plan.model).__name__]
    plan.config.save_pretrained(folder)
    if (teacher.folder / GENERATION).is_file():
        shutil.copyfile(teacher.folder / GENERATION, folder / GENERATION)
    else:
        plan.model.generation_config.save_pretrained(folder)


def _check(teacher: Teacher, config: ConvertConfig) -> Agreement | None:
    if not config.check_tokens:
        return None
    layers = tuple(range(teacher.config.num_hidden_layers))
    kept = student_config(teacher, replace(config, keep_layers=layers))
    make_plan(teacher, kept)
    return check_kept(teacher, kept, config.check_tokens, config.seed)


def _report(
    teacher: Teacher,
    plan: Plan,
    config: ConvertConfig,
    checked: Agreement | None,
    tokenizer: list[str],
) -> dict[str, Any]:
    options = {key: value for key, value in asdict(config).items() if key not in ("teacher", "out")}
    layers = range(plan.config.num_hidden_layers)
    kept = sorted(config.keep_layers)
    return {
        "teacher": {
            "folder": config.teacher,
            "family": teacher.family.model_type,
            "files": {file: sha256(teacher.folder / file) for file in (CONFIG, *teacher.files)},
        },
        "options": options,
        "layers": {"converted": [layer for layer in layers if layer not in kept], "kept": kept},
        "copied": plan.copied,
        "new": list(plan.new),
        "left_out": list(teacher.left_out),
        "tokenizer": tokenizer,
        "check": None if checked is None else asdict(checked),
        "versions": {
            "gated-slots": gsa.__version__,
            **{name: version(name) for name in ("torch", "transformers", "safetensors")},
        },
    }


def _check_free(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(
            f"out: expected a new or empty folder, got {out}, which is in use; choose another, or "
            "remove it yourself"
        )


def _check_room(out: Path, teacher: Teacher) -> None:
    """RunError if the disk cannot hold what the teacher's files hold."""
    place = next(path for path in out.absolute().parents if path.is_dir())
    needed = sum((teacher.folder / file).stat().st_size for file in teacher.files)
    free = shutil.disk_usage(place).free
    if free < needed:
        raise RunError(
            f"out: expected {needed / 1e9:.1f} GB free under {place}, got {free / 1e9:.1f} GB"
        )
