"""
The console command `ncsn-diffusers`.

It stands beside the package, not in it: importing the package imports torch and diffusers, which takes seconds, and
`--help`, `--version`, a misspelt command and a misspelt flag should answer at once.
"""

import difflib
import importlib
import importlib.util
import sys
from importlib.metadata import version

COMMANDS = {
    "train": "train a network",
    "sample": "draw images with a trained pipeline",
    "evaluate": "compare a pipeline's images with real ones",
    "convert": "turn a checkpoint of others into a pipeline",
    "demo": "try a pipeline in the browser",
    "push": "publish a pipeline on the Hub",
}

USAGE = f"""\
usage: ncsn-diffusers COMMAND [SETTINGS]
       ncsn-diffusers COMMAND --help
       ncsn-diffusers --version

example: ncsn-diffusers sample --num_images 16

commands:
{chr(10).join(f"  {name:10}{text}" for name, text in COMMANDS.items())}

On several GPUs: accelerate launch -m ncsn_diffusers.commands.COMMAND [SETTINGS]"""


def import_without_init(*packages: str) -> None:
    """
    Import packages without running their `__init__`, so that modules in them that need little can be imported. When the
    command line has been read, `ncsn_diffusers.commands.cli` runs what was left out.
    """
    for name in packages:
        if name not in sys.modules:
            spec = importlib.util.find_spec(name)
            sys.modules[name] = importlib.util.module_from_spec(spec)


def main() -> None:
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in COMMANDS:
        import_without_init("ncsn_diffusers", "ncsn_diffusers.evaluation", "ncsn_diffusers.training")
        importlib.import_module(f"ncsn_diffusers.commands.{command}").main(arguments, f"ncsn-diffusers {command}")
    elif command in ("--help", "-h"):
        print(USAGE)
    elif command == "--version":
        print(version("ncsn_diffusers"))
    else:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}."
        print(f"ncsn-diffusers: there is no command {command!r}; {hint}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
