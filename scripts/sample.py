"""Draw images: `python scripts/sample.py PIPELINE`, or with `accelerate launch` on several devices."""

from ncsn_diffusers.commands.sample import main

if __name__ == "__main__":
    main()
