"""The networks of the two NCSN papers and the U-Net that is told of levels, on their own."""

import math

import pytest
import torch
from diffusers import UNet2DModel

from ncsn_diffusers.networks_ncsn import (
    InstanceNorm2dPlus,
    LevelUNet2DModel,
    RefineNet2DModel,
)

SMALL = {"sample_size": 16, "in_channels": 1, "block_out_channels": (8, 16, 16, 16), "dilations": (1, 1, 2, 4)}
SIGMAS = [1.0, 0.4, 0.1]


@pytest.fixture
def x():
    return torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("channels", "dilations", "levels", "number"),
    [
        ((128, 256, 256, 256), (1, 1, 2, 4), None, 29_694_083),
        ((128, 256, 256, 512, 512), (1, 1, 1, 2, 4), None, 83_445_379),
        ((128, 256, 256, 256, 512, 512), (1, 1, 1, 1, 2, 4), None, 94_132_611),
        ((128, 256, 256, 256), (1, 1, 2, 4), 10, 30_117_635),
    ],
)
def test_number_of_parameters(channels, dilations, levels, number):
    sigmas = None if levels is None else [0.5**i for i in range(levels)]
    with torch.device("meta"):
        network = RefineNet2DModel(block_out_channels=channels, dilations=dilations, sigmas=sigmas)
    assert sum(p.numel() for p in network.parameters()) == number


def test_instance_norm_plus_is_the_papers_equation():
    torch.manual_seed(0)
    norm, x = InstanceNorm2dPlus(4), 3 + 2 * torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        norm.beta.normal_()
    mu, s = x.mean((2, 3)), x.var((2, 3), correction=0).sqrt()
    m, v = mu.mean(1, keepdim=True), mu.std(1, keepdim=True)
    z = (x - mu[..., None, None]) / s[..., None, None] + (norm.alpha * (mu - m) / v)[..., None, None]
    expected = norm.gamma.reshape(-1, 1, 1) * z + norm.beta.reshape(-1, 1, 1)
    torch.testing.assert_close(norm(x), expected, rtol=1e-3, atol=1e-3)


def test_unconditional_output_is_divided_by_sigma(x):
    network = RefineNet2DModel(**SMALL).eval()
    at_1 = network(x, torch.tensor(1.0)).sample
    torch.testing.assert_close(network(x, torch.tensor([0.5, 2.0, 10.0]), return_dict=False)[0][1], at_1[1] / 2)
    torch.testing.assert_close(network(x, 0.25).sample, 4 * at_1)  # a plain number is not cut down to an integer


def test_centering_takes_data_in_0_1(x):
    network = RefineNet2DModel(**SMALL).eval()
    centered = RefineNet2DModel(**SMALL, center_input_sample=True).eval()
    centered.load_state_dict(network.state_dict())
    torch.testing.assert_close(centered(x, 1.0).sample, network(2 * x - 1, 1.0).sample)


def test_a_level_takes_its_own_embedding(x):
    network = RefineNet2DModel(**SMALL, sigmas=SIGMAS).eval()
    single = RefineNet2DModel(**SMALL).eval()
    state = network.state_dict()
    for row, sigma in enumerate(SIGMAS):
        output = network(x, torch.tensor(sigma)).sample
        changed = {
            name: tensor.index_add(0, torch.tensor([(row + 1) % 3]), torch.ones_like(tensor[:1]))
            for name, tensor in state.items()
            if name.endswith("embedding")
        }
        network.load_state_dict({**state, **changed})
        torch.testing.assert_close(network(x, torch.tensor(sigma)).sample, output)  # another level's does not matter
        network.load_state_dict(state)
    assert not set(single.state_dict()) & {name for name in state if name.endswith("embedding")}


def test_between_levels_embeddings_are_interpolated(x):
    network = RefineNet2DModel(**SMALL, sigmas=SIGMAS).eval()
    middle = math.sqrt(0.4 * 0.1)
    state = network.state_dict()
    mean = {name: tensor[1:].mean(0).expand_as(tensor) for name, tensor in state.items() if name.endswith("embedding")}
    output = network(x, torch.tensor(middle)).sample
    network.load_state_dict({**state, **mean})
    torch.testing.assert_close(output, network(x, torch.tensor(0.4)).sample)


def test_half_precision_finds_the_same_level(x):
    network = RefineNet2DModel(**SMALL, sigmas=SIGMAS)
    level = network.to(torch.float16)._ladder.find(torch.tensor(SIGMAS))
    assert level.tolist() == [0, 1, 2]
    assert network.bfloat16()(x.bfloat16(), torch.tensor(0.4)).sample.isfinite().all()


def test_saving_and_loading(x, tmp_path):
    for network in (RefineNet2DModel(**SMALL, sigmas=SIGMAS), RefineNet2DModel(**SMALL)):
        network.save_pretrained(tmp_path)
        loaded = type(network).from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(x, 0.2).sample, network.eval()(x, 0.2).sample)


def test_it_trains(x):
    torch.manual_seed(0)
    network = RefineNet2DModel(**SMALL, sigmas=SIGMAS)
    optimizer, losses = torch.optim.Adam(network.parameters(), lr=1e-3), []
    sigma, noise = torch.tensor(SIGMAS), torch.randn(3, 1, 16, 16)
    for _ in range(15):
        score = network(sigma.reshape(-1, 1, 1, 1) * noise, sigma).sample
        loss = (sigma.reshape(-1, 1, 1, 1) * score + noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"dilations": (1, 1)}, "`block_out_channels` and `dilations`"),
        ({"dilations": (1, 1, 2, 0)}, "`block_out_channels` and `dilations`"),
        ({"sigmas": [0.1, 1.0]}, "`sigmas`"),
        ({"sigmas": [1.0]}, "`sigmas`"),
        ({"sigmas": [1.0, 0.0]}, "`sigmas`"),
    ],
)
def test_settings_are_checked(settings, named):
    with pytest.raises(ValueError, match=named):
        RefineNet2DModel(**{**SMALL, **settings})


def test_class_labels_are_refused(x):
    with pytest.raises(ValueError, match="class_labels"):
        RefineNet2DModel(**SMALL)(x, 1.0, class_labels=torch.zeros(3, dtype=torch.long))


def test_level_unet_counts_from_the_largest_level(x, tmp_path):
    torch.manual_seed(0)
    settings = {
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
    }
    network = LevelUNet2DModel(SIGMAS, 16, 1, settings)
    expected = network.model.eval()(x, torch.tensor([0, 1, 2])).sample
    assert isinstance(network.model, UNet2DModel)
    torch.testing.assert_close(network(x, torch.tensor(SIGMAS)).sample, expected)
    torch.testing.assert_close(network(x, math.sqrt(0.4)).sample, network.model(x, torch.tensor(0.5)).sample)
    network.save_pretrained(tmp_path)
    loaded = LevelUNet2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(x, 0.4).sample, network(x, 0.4).sample)
