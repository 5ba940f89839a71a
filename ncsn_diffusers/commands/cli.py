"""A command line from a dataclass, with its settings in groups, and errors of the user as one sentence."""

import ast
import atexit
import dataclasses
import gc
import inspect
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


def parse(config_class: type, arguments: Sequence[str] | None, name: str, example: str) -> dict[str, Any]:
    """The values of the config's fields that the arguments give: those of the command line, where they are None."""
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
    return values


def command_name() -> str:
    """This program, as it was typed."""
    spec = sys.modules["__main__"].__spec__
    return Path(sys.argv[0]).name if spec is None else f"python -m {spec.name}"


def show_flags(message: str, config_class: type) -> str:
    """The message with the config's settings as they are typed: `--resolution` for the argument `resolution`."""
    hints = get_type_hints(config_class, include_extras=True)
    typed = {}
    for field in dataclasses.fields(config_class):
        details = getattr(hints[field.name], "__metadata__", ())
        metavar = next((found.metavar for found in details if getattr(found, "metavar", None)), None)
        typed[field.name] = metavar or f"--{field.name}"
    return re.sub(r"`(\w+)`", lambda found: typed.get(found[1], found[0]), message)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM raise [`Terminated`] in the block; afterwards neither it nor Ctrl-C prints a traceback."""
    if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
        yield
        return

    def terminate(number, _):
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while the program is ending
        sys.unraisablehook = lambda _: None  # a progress bar that was only half built fails when it is freed
        before = signal.SIG_DFL
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def finish_imports() -> None:
    """Run the `__init__` of packages that the program `ncsn-diffusers` has imported without it."""
    for name in ("ncsn_diffusers", "ncsn_diffusers.evaluation", "ncsn_diffusers.training"):
        package = sys.modules.get(name)
        if package is not None and not hasattr(package, "__all__"):
            package.__spec__.loader.exec_module(package)


def run(
    config_class: type[Config],
    function: Callable[[Config], Any],
    example: str,
    arguments: Sequence[str] | None = None,
    name: str | None = None,
    *,
    resumes: bool = False,
) -> None:
    """
    Call the function with the settings that the command line gives. Errors that a user can mend, Ctrl-C and SIGTERM end
    the program with a sentence.

    Args:
        config_class (`type`): a dataclass; the first line of each dataclass that it inherits from is a heading.
        function (`Callable`): is given the config.
        example (`str`): a command line, for the top of `--help`.
        arguments (`Sequence[str]`, *optional*): instead of those of the command line.
        name (`str`, *optional*): what messages call the program.
        resumes (`bool`, defaults to `False`): whether the command goes on where it stopped when it is started again.
    """
    name = name or command_name()
    config = None
    # When the program ends, Python would search all that torch has imported for cycles: over a second of CPU time
    atexit.register(gc.freeze)
    try:
        with terminated_as_interrupted():
            values = parse(config_class, arguments, name, example)
            finish_imports()
            config = config_class(**values)
            function(config)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"{name}: {show_flags(str(error), config_class)}") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise SystemExit(f"{name}: {describe_memory(error, config)}") from error
    except KeyboardInterrupt as interrupt:
        terminated = isinstance(interrupt, Terminated)
        go_on = " The same command goes on where it stopped." if resumes and config is not None else ""
        print(f"\n{name}: {'terminated' if terminated else 'interrupted'}.{go_on}", file=sys.stderr)
        raise SystemExit(143 if terminated else 130) from None


def is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether the device's memory is used up, or the computer's."""
    kinds = (type(error).__name__, str(error))
    return isinstance(error, MemoryError) or kinds[0] == "OutOfMemoryError" or "can't allocate memory" in kinds[1]


def describe_memory(error: MemoryError | RuntimeError, config: Any) -> str:
    """That memory is used up, with torch's first sentences, and which settings need less."""
    said = ". ".join(str(error).split(". ")[:2]).rstrip(".")
    sizes = [field.name for field in dataclasses.fields(config) if field.name.endswith("batch_size")] if config else []
    smaller = " or ".join(f"--{size} (now {getattr(config, size)})" for size in sizes)
    way_out = f" A smaller {smaller} needs less." if smaller else ""
    return f"there is not enough memory{f': {said}' if said else ''}.{way_out}"
