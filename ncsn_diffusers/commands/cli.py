"""A command line from a dataclass, with its settings in groups, and errors of the user as one sentence."""

import ast
import dataclasses
import inspect
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

Config = TypeVar("Config")


def help_texts(config_class: type) -> dict[str, str]:
    """The docstring below each field that the class itself declares."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(config_class)))
    texts = {}
    for field, text in zip(tree.body[0].body, tree.body[0].body[1:], strict=False):
        match field, text:
            case ast.AnnAssign(target=ast.Name(name)), ast.Expr(value=ast.Constant(str(value))):
                texts[name] = " ".join(value.split())
    return texts


def group_fields(config_class: type) -> dict[type, list[str]]:
    """
    The dataclasses that the config inherits from, and the config itself, each with the fields that it is the first to
    declare. One that declares a field again, to change its default, leaves the field in its group.
    """
    groups, seen = {}, set()
    for owner in filter(dataclasses.is_dataclass, reversed(config_class.__mro__)):
        groups[owner] = [name for name in inspect.get_annotations(owner) if name not in seen]
        seen.update(groups[owner])
    return {owner: names for owner, names in groups.items() if names}


def nest(config_class: type) -> type:
    """
    A dataclass that holds the config's own fields, and a dataclass for each group that it inherits. tyro makes the
    headings of `--help` of these, and the same flags as of the flat config.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    hints = get_type_hints(config_class, include_extras=True)
    texts = {}
    for owner in filter(dataclasses.is_dataclass, reversed(config_class.__mro__)):
        texts |= help_texts(owner)

    def declare(name: str) -> tuple[str, Any, Any]:
        hint = Annotated[hints[name], tyro.conf.arg(help=texts.get(name))]
        default = dataclasses.field(default=fields[name].default, default_factory=fields[name].default_factory)
        return name, hint, default

    members = []
    for owner, names in group_fields(config_class).items():
        if owner is config_class:
            members += map(declare, names)
        else:
            heading, _, rest = inspect.cleandoc(owner.__doc__ or owner.__name__).partition("\n")
            group = dataclasses.make_dataclass(owner.__name__, map(declare, names), kw_only=True)
            group.__doc__ = rest.strip()
            members.append((owner.__name__, Annotated[group, tyro.conf.arg(name=heading.rstrip("."))]))
    return dataclasses.make_dataclass(config_class.__name__, members, kw_only=True)


def parse(config_class: type[Config], arguments: Sequence[str] | None, name: str, example: str) -> Config:
    """The config that the arguments give: those of the command line, where they are None."""
    paragraphs = [" ".join(part.split()) for part in (inspect.getdoc(config_class) or "").split("\n\n")]
    nested = tyro.cli(
        tyro.conf.OmitArgPrefixes[nest(config_class)],
        prog=name,
        description="\n\n".join([f"Example: {example}", *paragraphs]),
        args=arguments,
        use_underscores=True,
    )
    values = {}
    for owner, names in group_fields(config_class).items():
        group = nested if owner is config_class else getattr(nested, owner.__name__)
        values |= {name: getattr(group, name) for name in names}
    return config_class(**values)


def command_name() -> str:
    """This program, as it was typed."""
    spec = sys.modules["__main__"].__spec__
    return Path(sys.argv[0]).name if spec is None else f"python -m {spec.name}"


def run(
    config_class: type[Config],
    function: Callable[[Config], Any],
    example: str,
    arguments: Sequence[str] | None = None,
    name: str | None = None,
) -> None:
    """
    Call the function with the settings that the command line gives.

    Args:
        config_class (`type`): a dataclass; the first line of each dataclass that it inherits from is a heading.
        function (`Callable`): is given the config. Errors that a user can mend end the program with their message.
        example (`str`): a command line, for the top of `--help`.
        arguments (`Sequence[str]`, *optional*): instead of those of the command line.
        name (`str`, *optional*): what messages call the program.
    """
    name = name or command_name()
    try:
        function(parse(config_class, arguments, name, example))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"{name}: {error}") from error
