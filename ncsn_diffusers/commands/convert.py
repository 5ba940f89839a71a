"""Turn a checkpoint of others into a pipeline: `ncsn-diffusers convert CHECKPOINT FOLDER`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .cli import run

EXAMPLE = "ncsn-diffusers convert checkpoint.pth my-ncsn"


@dataclass
class ConvertConfig:
    """
    Turn a checkpoint of NCSN, NCSNv2, adversarial score matching, score_sde (NCSN++) or diffusers-ncsn into a pipeline.

    No code of the checkpoint is run. Settings that are not given come from the file or from the paper; the command says
    which it has guessed.
    """

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")]
    """The file, checkpoint.pth for example, or for diffusers-ncsn the pipeline's folder."""

    output_dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUTPUT_DIR")]
    """New folder for the pipeline."""

    sample_size: int | None = None
    """Height and width of the images."""

    data_min: float | None = None
    """Black in the data: 0, as published, or -1."""

    sigma_min: float | None = None
    """Smallest noise level, in the network's units, where the file does not hold the levels."""

    sigma_max: float | None = None
    """Largest noise level: `sigma_begin` or `sigma_max` in the original's config."""

    num_train_timesteps: int | None = None
    """Number of noise levels: `num_classes` or `num_scales` in the original's config."""

    num_langevin_steps: int | None = None
    """Steps a level: `n_steps_each` in the original's config."""

    step_lr: float | None = None
    """Step size at the last level, in the network's units squared, as in the original's config."""

    denoise_final: bool | None = None
    """End on the denoised estimate: `denoise` in the original's config."""

    act_fn: str | None = None
    """Activation: `nonlinearity` in the original's config, elu, relu, leaky_relu (lrelu) or silu (swish)."""


def convert_checkpoint(config: ConvertConfig) -> None:
    settings = asdict(config)
    checkpoint, output_dir = settings.pop("checkpoint"), Path(settings.pop("output_dir"))
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"`output_dir`={str(output_dir)!r} exists: give a new folder, or an empty one.")
    from ..convert import convert  # these import torch and diffusers, which takes seconds
    from ..hub import save_as_new

    pipe = convert(checkpoint, **settings)
    save_as_new(pipe, output_dir)
    number = sum(parameter.numel() for parameter in pipe.unet.parameters())
    print(
        f"Saved a {type(pipe.unet).__name__} of {number:,} parameters in {output_dir.resolve()}. "
        f"NCSNPipeline.from_pretrained({str(output_dir)!r}) loads it."
    )


def main(arguments: Sequence[str] | None = None, name: str | None = None) -> None:
    run(ConvertConfig, convert_checkpoint, EXAMPLE, arguments, name)


if __name__ == "__main__":
    main()
