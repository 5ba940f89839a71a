"""Train a noise conditional score network: `accelerate launch scripts/train_ncsn.py --help`."""

import tyro

from ncsn_diffusers.training import TrainingConfig, train

if __name__ == "__main__":
    try:
        train(tyro.cli(TrainingConfig, use_underscores=True))
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(f"train_ncsn.py: {error}") from error
