"""Small pipelines to be saved, published and loaded, and what is compared of them."""

import torch
from networks import small_unet

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNPipeline


def make_pipeline(scheduler=None, **arguments):
    return NCSNPipeline(small_unet(**arguments), scheduler or AnnealedLangevinScheduler())


def draw(pipe, **arguments):
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 3, "output_type": "pt", **arguments}
    return pipe(generator=torch.Generator().manual_seed(0), **arguments).images


def check_same(pipe, expected):
    """The same weights; the images up to float32's roundings, which depend on where in memory the weights lie."""
    assert all(map(torch.equal, pipe.unet.state_dict().values(), expected.unet.state_dict().values()))
    torch.testing.assert_close(draw(pipe), draw(expected), rtol=0, atol=1e-5)


def flatten(folder):
    """As the oldest repositories are: everything in one folder."""
    for part in ("unet", "scheduler"):
        for path in (folder / part).iterdir():
            path.rename(folder / path.name)
        (folder / part).rmdir()
