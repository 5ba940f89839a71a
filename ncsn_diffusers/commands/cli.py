"""A command line from a dataclass, and errors of the user as one sentence."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro


def run(config_class: type, function: Callable[[Any], Any], arguments: Sequence[str] | None = None) -> None:
    """Call the function with the settings that the command line gives."""
    try:
        function(tyro.cli(config_class, args=arguments, use_underscores=True))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        raise SystemExit(f"{sys.argv[0].rsplit('/', 1)[-1]}: {error}") from error
