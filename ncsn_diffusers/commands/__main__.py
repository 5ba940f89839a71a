"""The console command `ncsn-diffusers`."""

import importlib
import sys

COMMANDS = {
    "train": "train a network",
    "sample": "draw images",
    "evaluate": "compare drawn images with real ones",
    "push": "publish a pipeline on the Hub",
    "convert": "turn a checkpoint of others into a pipeline",
}


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] and arguments[0] in COMMANDS:
        sys.argv = [f"ncsn-diffusers {arguments[0]}", *arguments[1:]]
        importlib.import_module(f"ncsn_diffusers.commands.{arguments[0]}").main()
        return
    usage = "\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())
    usage = f"usage: ncsn-diffusers COMMAND [--help] …\n\n{usage}"
    if arguments in ([], ["--help"], ["-h"]):
        print(usage)
    else:
        raise SystemExit(f"ncsn-diffusers: there is no command {arguments[0]!r}\n{usage}")


if __name__ == "__main__":
    main()
