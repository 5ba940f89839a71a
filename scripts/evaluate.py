"""How good a pipeline's images are: `python scripts/evaluate.py PIPELINE`, or with `accelerate launch`."""

from ncsn_diffusers.commands.evaluate import main

if __name__ == "__main__":
    main()
