"""
Checkpoints of others as pipelines of this package: the networks of the two NCSN papers, of adversarial score matching,
of score_sde and of the package diffusers-ncsn.

A checkpoint is a stranger's: it is read by torch's loader for plain tensors, which runs no code. Each of its tensors
becomes one of the network's, or is named; each of the network's has to be found. Settings that the file does not hold
come from the publication that it matches, and a warning names them; without such a publication they have to be given.

Such a network is given sigma and the noisy image as it is, and returns the score, in units of data in [0, 1]:
`conditioning="sigma"`, `prediction_type="score"`, `data_min=0`.
"""

import os
from pathlib import Path

from ..hub.loading import NCSNPipeline
from .checkpoints import Given, read, wrap
from .diffusers_ncsn import convert_diffusers_ncsn
from .ncsnpp import convert_ncsnpp
from .refinenets import convert_refinenet

__all__ = ["convert"]


def convert(
    checkpoint: str | os.PathLike,
    *,
    sample_size: int | None = None,
    data_min: float | None = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    num_train_timesteps: int | None = None,
    num_langevin_steps: int | None = None,
    step_lr: float | None = None,
    denoise_final: bool | None = None,
    act_fn: str | None = None,
) -> NCSNPipeline:
    """
    A pipeline with the weights of another's checkpoint, their moving average where there is one, and with the sampler
    of its paper. A warning says what has been guessed, and which parts of the file are not used.

    | checkpoint | what it holds |
    | --- | --- |
    | NCSN (Song & Ermon 2019, arXiv:1907.05600) | `[model, optimizer]` |
    | NCSNv2, -Deeper, -Deepest (Song & Ermon 2020, arXiv:2006.09011) | `[model, optimizer, epoch, step, average]` |
    | Jolicoeur-Martineau et al. 2020, arXiv:2009.05475, without U-Net | the same |
    | NCSN++ of score_sde (Song et al. 2021, arXiv:2011.13456), 256 and 1024 pixels | `{model, ema, optimizer, step}` |
    | diffusers-ncsn 0.1.0 | a pipeline's folder |

    The state dict of such a network is taken as well, alone or as `{"state_dict": …}`, in a file of torch's or of
    safetensors.

    Args:
        checkpoint (`str` or `PathLike`): the file, or for diffusers-ncsn the folder.
        sample_size (`int`, *optional*): Height and width of the images.
        data_min (`float`, *optional*): Black in the data, 0 (as published) or -1.
        sigma_min (`float`, *optional*), sigma_max (`float`, *optional*):
            The ends of the geometric ladder, in the network's units, where the file has no ladder.
        num_train_timesteps (`int`, *optional*): The number of its levels, where the file does not say.
        num_langevin_steps (`int`, *optional*): Steps a level, `n_steps_each` in the originals' configs.
        step_lr (`float`, *optional*): Their step size, that of the last level, in the network's units squared.
        denoise_final (`bool`, *optional*): Their `denoise`.
        act_fn (`str`, *optional*):
            Their `nonlinearity`, of which the weights hold no trace: "elu", as published, "relu", "leaky_relu" (their
            "lrelu") or "silu" (their "swish").

    Returns:
        [`NCSNPipeline`]

    Raises:
        OSError: the file cannot be read, holds something else, lacks tensors or has more than the network; the message
            names them.
        ValueError: an argument is out of range, contradicts the file, or is needed.
    """
    given = Given(
        sample_size,
        data_min,
        sigma_min,
        sigma_max,
        num_train_timesteps,
        num_langevin_steps,
        step_lr,
        denoise_final,
        act_fn,
    )
    source = str(checkpoint)
    if Path(source).is_dir():
        return convert_diffusers_ncsn(Path(source), given)
    parts = wrap(read(source), source)
    if isinstance(parts, dict):
        return convert_ncsnpp(parts, source, given)
    return convert_refinenet(parts, source, given)
