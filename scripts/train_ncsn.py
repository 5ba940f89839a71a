"""Train a noise conditional score network: `accelerate launch scripts/train_ncsn.py --help`."""

from ncsn_diffusers.commands.train import main

if __name__ == "__main__":
    main()
