"""A page to try a pipeline: `python scripts/demo.py PIPELINE`."""

from ncsn_diffusers.commands.demo import main

if __name__ == "__main__":
    main()
