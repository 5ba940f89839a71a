"""
What the originals' code returns for weights that anyone can make again: the reference of the converter's tests.

`python tests/convert_reference.py FOLDER` needs clones of the four repositories in FOLDER, under the names of
`REPOSITORIES`, and writes tests/assets/convert. Nothing of them is part of this package. Each file holds the `output`
at five noise levels, `sigmas`, and in its metadata the names and shapes of the network's tensors.

[`NCSNpp`] is written anew, from the paper and the layout of the originals' weights, for networks of other sizes than
the one in the assets. A test compares it with that one.
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
from torch.nn import functional as F  # noqa: N812 (its usual name)
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


class NCSNpp:
    """
    The NCSN++ of score_sde with resblock_type="biggan", "input_skip", "output_skip", progressive_combine="sum", FIR
    filters and skip_rescale.

    Args:
        nf, ch_mult, num_res_blocks: as of the originals' config.
        attention (`set[int]`): the levels with attention, 0 the finest.
    """

    def __init__(self, nf: int, ch_mult: tuple[int, ...], num_res_blocks: int, attention: set[int]):
        self.channels, self.num_res_blocks, self.attention = [nf * m for m in ch_mult], num_res_blocks, attention
        self.nf, self.shapes, self.count = nf, {}, 0
        self._declare({"W": [nf]})
        self._declare({"weight": [4 * nf, 2 * nf], "bias": [4 * nf]})
        self._declare({"weight": [4 * nf, 4 * nf], "bias": [4 * nf]})
        self._declare({"weight": [nf, 3, 3, 3], "bias": [nf]})
        stack, last = [nf], len(ch_mult) - 1
        for level, c in enumerate(self.channels):
            for _ in range(num_res_blocks):
                self._declare_resnet(stack[-1], c)
                self._declare_attention(level, c)
                stack.append(c)
            if level < last:
                self._declare_resnet(c, c, resizes=True)
                self._declare({"Conv_0.weight": [c, 3, 1, 1], "Conv_0.bias": [c]})
                stack.append(c)
        h = self.channels[-1]
        self._declare_resnet(h, h)
        self._declare_attention(None, h)
        self._declare_resnet(h, h)
        for level in reversed(range(len(ch_mult))):
            c = self.channels[level]
            for _ in range(num_res_blocks + 1):
                self._declare_resnet(h + stack.pop(), c)
                h = c
            self._declare_attention(level, c)
            self._declare({"weight": [c], "bias": [c]})
            self._declare({"weight": [3, c, 3, 3], "bias": [3]})
            if level:
                self._declare_resnet(c, c, resizes=True)
        self.shapes["sigmas"] = [20]

    def _declare(self, shapes):
        self.shapes |= {f"all_modules.{self.count}.{name}": shape for name, shape in shapes.items()}
        self.count += 1

    def _declare_resnet(self, a, b, resizes=False):
        shapes = {"GroupNorm_0.weight": [a], "GroupNorm_0.bias": [a], "Conv_0.weight": [b, a, 3, 3], "Conv_0.bias": [b]}
        shapes |= {"Dense_0.weight": [b, 4 * self.nf], "Dense_0.bias": [b], "GroupNorm_1.weight": [b]}
        shapes |= {"GroupNorm_1.bias": [b], "Conv_1.weight": [b, b, 3, 3], "Conv_1.bias": [b]}
        if a != b or resizes:
            shapes |= {"Conv_2.weight": [b, a, 1, 1], "Conv_2.bias": [b]}
        self._declare(shapes)

    def _declare_attention(self, level, c):
        if level is None or level in self.attention:
            nin = {f"NIN_{i}.{name}": shape for i in range(4) for name, shape in (("W", [c, c]), ("b", [c]))}
            self._declare({"GroupNorm_0.weight": [c], "GroupNorm_0.bias": [c], **nin})

    def __call__(self, state: dict, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The score of images x `(n, 3, height, width)` in [0, 1] with noise sigma `(n,)`."""
        count = iter(range(self.count))

        def take():
            prefix = f"all_modules.{next(count)}."
            return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}

        def norm(m, h, name=""):
            return F.group_norm(h, min(h.shape[1] // 4, 32), m[f"{name}weight"], m[f"{name}bias"], eps=1e-6)

        def conv(m, h, name=""):
            weight = m[f"{name}weight"]
            return F.conv2d(h, weight, m[f"{name}bias"], padding=weight.shape[-1] // 2)

        def resnet(h, resize=lambda h: h):
            m = take()
            y = conv(m, resize(F.silu(norm(m, h, "GroupNorm_0."))), "Conv_0.")
            y = y + F.linear(F.silu(embedding), m["Dense_0.weight"], m["Dense_0.bias"])[:, :, None, None]
            y = conv(m, F.silu(norm(m, y, "GroupNorm_1.")), "Conv_1.")
            h = resize(h)
            return (y + (conv(m, h, "Conv_2.") if "Conv_2.weight" in m else h)) / math.sqrt(2)

        def attention(level, h):
            if level is not None and level not in self.attention:
                return h
            m = take()
            nin = lambda i, y: torch.einsum("nchw,cd->ndhw", y, m[f"NIN_{i}.W"]) + m[f"NIN_{i}.b"][:, None, None]  # noqa: E731
            y = norm(m, h, "GroupNorm_0.")
            q, k, v = (nin(i, y).flatten(2) for i in range(3))
            weights = (q.mT @ k / math.sqrt(h.shape[1])).softmax(-1)
            return (h + nin(3, (v @ weights.mT).reshape(h.shape))) / math.sqrt(2)

        angles = sigma.log()[:, None] * take()["W"] * 2 * math.pi
        first, second = take(), take()
        embedding = F.linear(torch.cat([angles.sin(), angles.cos()], 1), first["weight"], first["bias"])
        embedding = F.linear(F.silu(embedding), second["weight"], second["bias"])
        pyramid = x = 2 * x - 1
        stack, last = [conv(take(), x)], len(self.channels) - 1
        for level in range(last + 1):
            for _ in range(self.num_res_blocks):
                stack.append(attention(level, resnet(stack[-1])))
            if level < last:
                h = resnet(stack[-1], _halve)
                pyramid = _halve(pyramid)
                stack.append(conv(take(), pyramid, "Conv_0.") + h)
        h = resnet(attention(None, resnet(stack[-1])))
        output = 0
        for level in reversed(range(last + 1)):
            for _ in range(self.num_res_blocks + 1):
                h = resnet(torch.cat([h, stack.pop()], 1))
            h = attention(level, h)
            m = take()
            output = conv(take(), F.silu(norm(m, h))) + (output if level == last else _double(output))
            if level:
                h = resnet(h, _double)
        assert not stack and next(count, None) is None
        return output / sigma.reshape(-1, 1, 1, 1)


def _filter(x: torch.Tensor, pad: tuple[int, int], gain: int, stride: int) -> torch.Tensor:
    kernel = torch.tensor([1.0, 3.0, 3.0, 1.0])
    kernel = (kernel[:, None] * kernel / 64 * gain).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(F.pad(x, (*pad, *pad)), kernel, groups=x.shape[1], stride=stride)


def _halve(x: torch.Tensor) -> torch.Tensor:
    return _filter(x, (1, 1), 1, 2)


def _double(x: torch.Tensor) -> torch.Tensor:
    spread = torch.zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    spread[:, :, ::2, ::2] = x
    return _filter(spread, (2, 1), 4, 1)


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
