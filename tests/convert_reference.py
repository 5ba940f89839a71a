"""
What the originals' code returns for weights that anyone can make again: the reference of the converter's tests.

`python tests/convert_reference.py FOLDER` needs clones of the four repositories in FOLDER, under the names of
`REPOSITORIES`, and writes tests/assets/convert. Nothing of them is part of this package. Each file holds the `output`
at five noise levels, `sigmas`, and in its metadata the names and shapes of the network's tensors.
"""

import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils import cpp_extension

ASSETS = Path(__file__).parent / "assets" / "convert"
REPOSITORIES = {
    "ncsn": "https://github.com/ermongroup/ncsn",
    "ncsnv2": "https://github.com/ermongroup/ncsnv2",
    "adversarial": "https://github.com/AlexiaJM/AdversarialConsistentScoreMatching",
    "score_sde": "https://github.com/yang-song/score_sde_pytorch",
}


def make_state(shapes: dict[str, list[int]], seed: int = 0, sigmas: list[float] | None = None) -> dict:
    """
    Random weights of these names and shapes, `sigmas` in the place of the buffer of that name. They do not depend on
    the version of NumPy, whose RandomState is frozen.
    """
    random = np.random.RandomState(seed)
    state = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape)
        if name.endswith("sigmas"):
            values = np.asarray(sigmas)
        elif len(shape) == 1 or "embed" in name:
            values = 1 + 0.3 * values
        else:
            values /= math.sqrt(math.prod(shape[1:]))
        state[name] = torch.from_numpy(values).float()
    return state


def geometric(largest: float, smallest: float, num: int) -> list[float]:
    return np.exp(np.linspace(np.log(largest), np.log(smallest), num)).tolist()


def make_sample(shape: tuple[int, ...], sigmas: torch.Tensor) -> torch.Tensor:
    """Gray images of this shape `(n, channels, height, width)`, the i-th with noise sigma_i."""
    noise = torch.from_numpy(np.random.RandomState(1).standard_normal(shape)).float()
    return 0.5 + noise * sigmas.reshape(-1, 1, 1, 1)


def read(name: str) -> tuple[dict[str, list[int]], torch.Tensor, torch.Tensor, torch.Tensor]:
    """The shapes of the network's tensors, the images, their noise levels and the network's output."""
    with safe_open(ASSETS / f"{name}.safetensors", framework="pt") as file:
        shapes, sigmas, output = json.loads(file.metadata()["shapes"]), *map(file.get_tensor, ("sigmas", "output"))
    return shapes, make_sample(output.shape, sigmas), sigmas, output


def _save(name, network, size, conditions, sigmas, ladder=None):
    shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    network.load_state_dict(make_state(shapes, sigmas=ladder))
    network.eval()
    sigmas = torch.tensor(sigmas)
    sample = make_sample((len(sigmas), *size), sigmas)
    with torch.no_grad():
        outputs = torch.cat(
            [network(x[None], condition[None]) for x, condition in zip(sample, conditions, strict=True)]
        )
    save_file({"sigmas": sigmas, "output": outputs}, ASSETS / f"{name}.safetensors", {"shapes": json.dumps(shapes)})


def _import(folder: Path, module: str):
    for name in [name for name in sys.modules if name.split(".")[0] in ("models", "op", "sde_lib")]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    found = importlib.import_module(module)
    sys.path.pop(0)
    return found


def main(folder: Path) -> None:
    data = {"channels": 3, "image_size": 16, "logit_transform": False, "rescaled": False}
    model = {"ngf": 8, "normalization": "InstanceNorm++", "nonlinearity": "elu", "spec_norm": False}
    ladder = {"sigma_begin": 50.0, "sigma_end": 0.01, "num_classes": 9, "sigma_dist": "geometric"}
    config = SimpleNamespace(
        data=SimpleNamespace(**data), model=SimpleNamespace(**model, **ladder), device=torch.device("cpu")
    )

    # five of the ladder's levels
    ncsn = _import(folder / "ncsn", "models.cond_refinenet_dilated")
    levels = torch.tensor([0, 2, 5, 7, 9])
    paper = SimpleNamespace(
        data=SimpleNamespace(channels=1, image_size=28, logit_transform=False),
        model=SimpleNamespace(ngf=8, num_classes=10),
    )
    sigmas = np.asarray(geometric(1, 0.01, 10))[levels].tolist()
    _save("ncsn", ncsn.CondRefineNetDilated(paper), (1, 28, 28), levels, sigmas)

    ncsnv2 = _import(folder / "ncsnv2", "models.ncsnv2")
    levels, whole = torch.tensor([0, 2, 5, 7, 8]), geometric(50, 0.01, 9)
    sigmas = np.asarray(whole)[levels].tolist()
    for name in ("NCSNv2", "NCSNv2Deeper", "NCSNv2Deepest"):
        _save(name.lower(), getattr(ncsnv2, name)(config), (3, 16, 16), levels, sigmas, whole)

    adversarial = _import(folder / "adversarial", "models.ncsnv2")
    network = adversarial.NCSNv2(config.model, config.data)
    _save("adversarial", network, (3, 16, 16), levels, sigmas)

    cpp_extension.load = lambda *args, **kwargs: None  # on a CPU its operations are plain torch
    ncsnpp = _import(folder / "score_sde", "models.ncsnpp")
    network = ncsnpp.NCSNpp(_ncsnpp_config(torch.device("cpu")))
    sigmas = [348.0, 20.0, 1.0, 0.1, 0.01]
    _save("ncsnpp", network, (3, 32, 32), torch.tensor(sigmas), sigmas, geometric(348, 0.01, 20))


def _ncsnpp_config(device):
    model = {
        "act": "swish",
        "nonlinearity": "swish",
        "nf": 32,
        "ch_mult": (1, 4, 4),
        "num_res_blocks": 1,
        "attn_resolutions": (16,),
        "dropout": 0.0,
        "resamp_with_conv": True,
        "conditional": True,
        "fir": True,
        "fir_kernel": [1, 3, 3, 1],
        "skip_rescale": True,
        "resblock_type": "biggan",
        "progressive": "output_skip",
        "progressive_input": "input_skip",
        "progressive_combine": "sum",
        "init_scale": 0.0,
        "fourier_scale": 16,
        "embedding_type": "fourier",
        "scale_by_sigma": True,
        "sigma_max": 348,
        "sigma_min": 0.01,
        "num_scales": 20,
    }
    return SimpleNamespace(
        model=SimpleNamespace(**model),
        data=SimpleNamespace(image_size=32, num_channels=3, centered=False),
        training=SimpleNamespace(continuous=True),
        device=device,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
