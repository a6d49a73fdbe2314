"""Options of a command out of the fields of its config."""

import argparse
import ast
import inspect
import itertools
import json
import types
import typing
from dataclasses import MISSING, fields
from typing import Any

_METAVARS = {int: "N", float: "X", str: "TEXT"}


def field_docs(config_class: type) -> dict[str, str]:
    """The docstring line under each field of a dataclass, or of what it inherits from."""
    docs = {}
    for kind in reversed(config_class.__mro__[:-1]):
        body = ast.parse(inspect.getsource(kind).lstrip()).body[0].body  # type: ignore
        for node, after in itertools.pairwise(body):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and is_text:
                docs[node.target.id] = str(after.value.value)  # type: ignore
    return docs


def add_fields(
    parser: argparse.ArgumentParser,
    config_class: type,
    *,
    positional: tuple[str, ...] = (),
    defaults: object = None,
) -> None:
    """One option per field: --max-new-tokens for max_new_tokens. Dicts are left to `take_dict`.

    defaults: an instance whose values the help shows; options not given are absent from the result.
    """
    hints = typing.get_type_hints(config_class)
    docs = field_docs(config_class)
    for field in fields(config_class):
        hint = hints[field.name]
        if typing.get_origin(hint) is dict:
            continue
        default = getattr(defaults, field.name, field.default)
        required = default is MISSING
        help_text = docs[field.name].replace("%", "%%")
        if not required and not (isinstance(default, bool) or default in ("", (), None)):
            help_text += f" [{default}]"
        options: dict[str, Any] = {"help": help_text, "default": argparse.SUPPRESS}
        if typing.get_origin(hint) is tuple:
            optional = field.name in positional and not required
            options |= {"nargs": "*" if optional else "+", "metavar": "X"}
            options["type"] = typing.get_args(hint)[0]
        elif typing.get_origin(hint) is typing.Literal:
            options["choices"] = typing.get_args(hint)
        elif hint is bool:
            options["action"] = "store_false" if default else "store_true"
        else:
            options["type"] = _simple_type(hint)
            options["metavar"] = _METAVARS[options["type"]]
        if field.name in positional:
            options["metavar"] = field.name.upper()
            parser.add_argument(field.name, **options)
        else:
            no = "no-" if options.get("action") == "store_false" else ""
            flag = f"--{no}{field.name.replace('_', '-')}"
            parser.add_argument(flag, dest=field.name, required=required, **options)


def _simple_type(hint: Any) -> type:
    if isinstance(hint, types.UnionType):  # int | None and the like
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def take_dict(arguments: list[str], name: str) -> tuple[dict[str, Any], list[str]]:
    """Splits `--model.num_slots 32` off the arguments: ({"num_slots": 32}, the rest).

    Values are JSON where they can be, else strings. ValueError for an option without a value.
    """
    found, rest, queue = {}, [], list(arguments)
    while queue:
        argument = queue.pop(0)
        if not argument.startswith(f"--{name}."):
            rest.append(argument)
            continue
        key, equals, value = argument.removeprefix(f"--{name}.").partition("=")
        if not equals:
            if not queue:
                raise ValueError(f"{argument}: expected a value after it")
            value = queue.pop(0)
        try:
            found[key.replace("-", "_")] = json.loads(value)
        except ValueError:
            found[key.replace("-", "_")] = value
    return found, rest
