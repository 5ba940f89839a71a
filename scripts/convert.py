"""Turn a checkpoint of others into a pipeline: `python scripts/convert.py CHECKPOINT FOLDER`."""

from ncsn_diffusers.commands.convert import main

if __name__ == "__main__":
    main()
