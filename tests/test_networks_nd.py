"""The networks of one to three dimensions, and the Gaussian with a network beside it, on their own."""

import json
import math
import re

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNPipeline
from ncsn_diffusers.denoiser import Denoiser
from ncsn_diffusers.networks_nd import GaussianResidualModel, UNetNDModel
from ncsn_diffusers.training import TrainingConfig, make_unet, train
from ncsn_diffusers.training.config import training_command
from ncsn_diffusers.training.network import channels_of, count_tokens, describe_choice, has_attention


@pytest.fixture
def x():
    return torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def small_nd(sample_size, **arguments):
    """A network with weights of which none is 0, so that every part of it matters."""
    torch.manual_seed(0)
    settings = {"block_out_channels": (8, 16), "norm_num_groups": 4, **arguments}
    network = UNetNDModel(sample_size, **settings).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return network


@pytest.mark.parametrize(
    "settings",
    [
        {"block_out_channels": (32, 64, 64), "add_attention": True},
        {"block_out_channels": (16, 32), "layers_per_block": 2, "conditioning": "sigma", "add_attention": True},
        {"block_out_channels": (8,), "add_attention": True},
        {"block_out_channels": (8, 16)},
    ],
)
def test_in_two_dimensions_it_is_a_unet_2d_model(settings):
    torch.manual_seed(0)
    classes = 3 if settings.get("layers_per_block") is None else None
    config = TrainingConfig(**settings)
    unet = make_unet(config, (2, 8, 12), classes).eval().requires_grad_(False)
    for parameter in unet.parameters():
        parameter += 0.05 * torch.randn_like(parameter)  # biases and norms are not what they begin as
    shared = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "norm_num_groups")
    shared += ("attention_head_dim", "time_embedding_type", "num_class_embeds", "add_attention")
    network = UNetNDModel(
        (8, 12),
        attention_levels=None if config.add_attention else (False, False),
        **{key: unet.config[key] for key in shared},
    ).eval()
    network.load_state_dict(unet.state_dict())
    x, t = torch.randn(3, 2, 8, 12), torch.tensor([0.5, 3.0, 700.25])
    labels = {} if classes is None else {"class_labels": torch.tensor([0, 2, 3])}
    torch.testing.assert_close(network(x, t, **labels).sample, unet(x, t, **labels).sample, rtol=0, atol=4e-6)


def test_attention_and_dropout_are_where_unet_2d_model_has_them(x):
    torch.manual_seed(0)
    unet = UNet2DModel(
        16, 1, 1, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, dropout=0.5, norm_eps=1e-3,
        down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        resnet_time_scale_shift="scale_shift", attention_head_dim=4,
    )  # fmt: skip
    settings = {"attention_levels": (True, False), "attention_head_dim": 4, "dropout": 0.5, "norm_eps": 1e-3}
    network = UNetNDModel((16, 16), 1, block_out_channels=(8, 16), norm_num_groups=4, **settings)
    network.load_state_dict(unet.state_dict())
    t = torch.tensor(5.0)
    torch.testing.assert_close(network.eval()(x, t).sample, unet.eval()(x, t).sample, rtol=0, atol=4e-6)
    dropouts = [
        {name for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout) and module.p == 0.5}
        for model in (network, unet)
    ]
    assert dropouts[0] == dropouts[1] != set()
    assert not torch.allclose(network.train()(x, t).sample, network.eval()(x, t).sample, atol=1e-3)


@pytest.mark.parametrize("num_dims", [1, 3])
def test_what_does_not_vary_along_a_side_is_a_network_of_one_dimension_less(num_dims):
    """
    A 2-D network whose kernels act along the second side alone is the 1-D network; a 3-D one that acts along the last
    two sides is the 2-D one. So 1-D and 3-D are the same function as 2-D, which is tested against diffusers.
    """
    low = small_nd((7, 9) if num_dims == 3 else (9,), in_channels=2)
    high = small_nd((4, *low.config.sample_size), in_channels=2)
    state = {}
    for name, tensor in high.state_dict().items():
        given = low.state_dict()[name]
        if given.ndim == tensor.ndim:
            state[name] = given
        else:
            state[name] = torch.zeros_like(tensor)
            state[name][:, :, tensor.shape[2] // 2] = given
    high.load_state_dict(state)
    x, t = torch.randn(2, 2, *low.config.sample_size), torch.tensor([2.5, 40.0])
    along = x[:, :, None].expand(-1, -1, 4, *[-1] * (x.ndim - 2))  # attention averages over equal points
    expected = low(x, t).sample[:, :, None].expand_as(along)
    torch.testing.assert_close(high(along, t).sample, expected, rtol=0, atol=2e-5)


def test_a_timestep_may_be_a_number_a_fraction_and_one_for_all():
    network = small_nd((11,))
    x = torch.randn(2, 1, 11)
    expected = network(x, torch.tensor([2.5, 2.5])).sample
    for t in (2.5, torch.tensor(2.5), torch.tensor([2.5])):
        assert torch.equal(network(x, t).sample, expected)
    assert not torch.allclose(network(x, 2.0).sample, expected, atol=1e-4)
    assert torch.equal(network(x, 2.5, return_dict=False)[0], expected)


def test_fourier_time_is_of_sigma_and_divides_the_output():
    network = small_nd((11,), time_embedding_type="fourier")
    x = torch.randn(2, 1, 11)
    same = network(x, torch.tensor([2.0, 2.0])).sample
    assert not torch.allclose(network(x, torch.tensor([2.0, 0.3])).sample[1], same[1], atol=1e-3)
    network.time_proj.weight.zero_()  # the embedding no longer depends on sigma: the division is left
    at_2, at_half = network(x, 2.0).sample, network(x, 0.5).sample
    torch.testing.assert_close(at_half, 4 * at_2)


def test_classes_change_the_output_and_must_be_given():
    network, x = small_nd((3, 5, 2), num_class_embeds=3), torch.randn(2, 1, 3, 5, 2)
    first, second = (network(x, 4.0, class_labels=torch.tensor(labels)).sample for labels in ([0, 1], [0, 2]))
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1], second[1], atol=1e-3)
    with pytest.raises(ValueError, match="`class_labels` must be given"):
        network(x, 4.0)
    with pytest.raises(ValueError, match="`class_labels` must be given for a network with"):
        small_nd((3,))(x[..., 0, 0], 4.0, class_labels=torch.tensor([0, 1]))


def test_bfloat16_and_compilation_return_the_same():
    network, x, t = small_nd((9,)), torch.randn(2, 1, 9), torch.tensor([2.5, 900.0])
    expected = network(x, t).sample
    graph = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(graph(x, t, return_dict=False)[0], expected)
    half = network.bfloat16()(x.bfloat16(), t).sample
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1 * expected.std().item())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"sample_size": 16}, "`sample_size` must be a tuple of 1 to 3"),
        ({"sample_size": (2, 2, 2, 2)}, "`sample_size` must be a tuple of 1 to 3"),
        ({"sample_size": (0, 4)}, "`sample_size` must be a tuple of 1 to 3"),
        ({"attention_levels": (True,)}, "`attention_levels` and `block_out_channels`"),
        ({"norm_num_groups": 3}, "multiples of `norm_num_groups`=3"),
        ({"attention_head_dim": 5}, "multiples of `attention_head_dim`=5"),
        ({"time_embedding_type": "learned"}, "`time_embedding_type` must be"),
    ],
)
def test_settings_of_any_dimension_are_checked(settings, named):
    with pytest.raises(ValueError, match=named):
        UNetNDModel(**{"sample_size": (8,), "block_out_channels": (8, 16), **settings})


def test_another_number_of_dimensions_is_refused():
    with pytest.raises(ValueError, match=r"`sample` must have 3 dimensions, .*1 sides, not .*\(2, 1\)"):
        small_nd((8,))(torch.zeros(2, 1), 1.0)


@pytest.mark.parametrize("size", [(11,), (5, 7), (3, 4, 5)])
def test_pipelines_of_any_dimension_come_back(size, tmp_path):
    network = small_nd(size, in_channels=2)
    NCSNPipeline(network, AnnealedLangevinScheduler()).save_pretrained(tmp_path)
    pipe = NCSNPipeline.from_pretrained(tmp_path)
    assert type(pipe.unet) is UNetNDModel
    assert pipe.sample_shape == (2, *size)
    for name, weights in network.state_dict().items():
        assert torch.equal(pipe.unet.state_dict()[name], weights), name
    # where weights lie in memory can change the rounding of a convolution
    x = torch.randn(2, 2, *size)
    torch.testing.assert_close(pipe.unet(x, 3.5).sample, network(x, 3.5).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sample_size", 8, r"`sample_size` must be a list of 1 to 3, each a whole number.*, not 8"),
        ("sample_size", None, r"`sample_size` must be a list of 1 to 3"),
        ("attention_levels", [1, 0], r"`attention_levels` must be null, or a list of 1 to 16, each true or false"),
        ("out_channels", 3, r"`out_channels` must equal `in_channels`=2, not 3"),
        ("layers_per_block", 10**9, r"`layers_per_block` must be a whole number from 1 to 32"),
    ],
)
def test_a_strangers_config_is_checked(key, value, message, tmp_path):
    NCSNPipeline(small_nd((5,), in_channels=2), AnnealedLangevinScheduler()).save_pretrained(tmp_path)
    path = tmp_path / "unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(OSError, match=message):
        NCSNPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("size", "kind", "sentence"),
    [
        ((28, 28), UNet2DModel, "is a UNet2DModel for images of 28 × 28"),
        ((37, 49), UNetNDModel, "UNetNDModel for images of 37 × 49: a UNet2DModel needs .* multiples of 4"),
        ((24,), UNetNDModel, "UNetNDModel for signals of 24"),
        ((8, 8, 8), UNetNDModel, "UNetNDModel for volumes of 8 × 8 × 8"),
    ],
)
def test_which_unet_is_trained(size, kind, sentence):
    config = TrainingConfig(block_out_channels=(8, 16, 16), layers_per_block=2)
    network = make_unet(config, (3, *size), num_classes=4)
    assert type(network) is kind
    assert re.search(sentence, describe_choice(config, *size))
    # heads, groups, layers and classes as in two dimensions
    settings = ("block_out_channels", "layers_per_block", "norm_num_groups", "attention_head_dim", "num_class_embeds")
    images = make_unet(config, (3, 28, 28), num_classes=4)
    assert [network.config[key] for key in settings] == [images.config[key] for key in settings]


@pytest.mark.parametrize(
    ("size", "num_levels"),
    [
        *(((28, 28), 3), ((32, 32), 3), ((36, 36), 3), ((96, 96), 3), ((100, 96), 4), ((128, 128), 4), ((256, 256), 5)),
        *(((2000,), 3), ((4000,), 4), ((32, 32, 32), 3), ((64, 64, 64), 4)),
    ],
)
def test_larger_data_are_halved_more_often(size, num_levels):
    """So that no more than 576 points attend to each other."""
    config = TrainingConfig()
    channels = (32,) + (64,) * (num_levels - 1)
    assert channels_of(config, *size) == channels
    assert count_tokens(channels, *size) <= 576 and (num_levels == 3 or count_tokens(channels[:-1], *size) > 576)
    said = f"For this size it has --block_out_channels {' '.join(map(str, channels))}."
    assert (said in describe_choice(config, *size)) == (num_levels > 3)
    assert "block_out_channels" not in training_command(config)
    asked = TrainingConfig(block_out_channels=(32, 64, 64))
    assert channels_of(asked, *size) == (32, 64, 64)
    assert "--block_out_channels 32 64 64" in training_command(asked)
    assert "For this size" not in describe_choice(asked, *size)
    if len(size) == 2:
        assert tuple(make_unet(config, (1, *size)).config.block_out_channels) == channels
    assert has_attention(config, *size) == (count_tokens(channels, *size) > 64) == (size not in ((28, 28), (32, 32)))
    for asked in (True, False):
        assert has_attention(TrainingConfig(add_attention=asked), *size) == asked


@pytest.mark.parametrize("size", [(16, 16), (9, 7), (24,)])
def test_a_unet_without_attention(size):
    names = {
        add_attention: {
            name
            for name, _ in make_unet(
                TrainingConfig(block_out_channels=(8, 16), add_attention=add_attention), (1, *size)
            ).named_parameters()
        }
        for add_attention in (None, True, False)
    }
    assert names[None] == names[False] < names[True]
    # on the way down, in the middle and, twice, on the way up
    lost = {name.split(".to_")[0] for name in names[True] - names[False] if ".to_" in name}
    assert lost == {
        *("down_blocks.1.attentions.0", "mid_block.attentions.0"),
        *("up_blocks.0.attentions.0", "up_blocks.0.attentions.1"),
    }
    assert not any("attentions" in name for name in names[False])


def test_sides_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"2 are a single point before .* halved 2 times.* at least 3"):
        make_unet(TrainingConfig(), (1, 2))
    with pytest.raises(ValueError, match=r"1 to 3 dimensions beside their channels, not 4, 2×2×2×2"):
        make_unet(TrainingConfig(), (1, 2, 2, 2, 2))


def test_images_that_cannot_be_halved_are_learned(tmp_path, capsys):
    AcceleratorState._reset_state(reset_partial_state=True)
    image = np.linspace(0, 255, 63).reshape(7, 9).astype(np.uint8)
    (tmp_path / "images").mkdir()
    for i in range(20):
        Image.fromarray(image).save(tmp_path / f"images/{i}.png")
    config = TrainingConfig(
        train_data_dir=str(tmp_path / "images"),
        output_dir=str(tmp_path / "out"),
        block_out_channels=(16, 16),
        train_batch_size=20,
        eval_batch_size=1,
        max_train_steps=150,
        learning_rate=5e-3,
        mixed_precision="no",
    )
    train(config)
    assert "The network is a UNetNDModel for images of 7 × 9: a UNet2DModel needs" in capsys.readouterr().out
    pipe = NCSNPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe.unet) is UNetNDModel
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe(4, 20, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert (drawn - torch.from_numpy(image / 255)).abs().mean() < 0.05


# The Gaussian and what is learned beside it


@pytest.fixture(params=[(6,), (3, 4), (2, 3, 2)])
def gaussian(request):
    """Few samples of an exactly known Gaussian, with a mean far from 0, of 2 channels."""
    torch.manual_seed(0)
    size = 2 * math.prod(request.param)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    x = torch.randn(500, size, dtype=torch.float64) * torch.logspace(0, -2, size, dtype=torch.float64) @ basis.T
    return (x + 3 * torch.randn(size, dtype=torch.float64)).reshape(500, 2, *request.param).float()


def exact_denoised(data, covariance, x, sigma):
    """m + S (S + sigma²)⁻¹ (x - m) by dense algebra in float64."""
    mean = data.double().flatten(1).mean(0)
    gain = covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(len(mean), dtype=torch.float64))
    return (mean + (x.double().flatten(1) - mean) @ gain.T).reshape(x.shape).float()


@pytest.mark.parametrize("sigma", [0.01, 0.3, 50.0])
def test_the_gaussians_denoiser_is_exact_at_every_level(gaussian, sigma):
    scheduler = AnnealedLangevinScheduler()
    size = gaussian[0].numel()
    covariance = torch.cov(gaussian.double().flatten(1).T)
    x = gaussian[:3] + sigma * torch.randn(3, *gaussian.shape[1:])
    sigmas = torch.full((3,), sigma)
    network = GaussianResidualModel.fit(gaussian, scheduler, rank=size)
    expected = exact_denoised(gaussian, covariance, x, sigma)
    denoised = Denoiser.of(network, scheduler)(x, sigmas)
    torch.testing.assert_close(denoised, expected, rtol=0, atol=3e-4 * max(1, sigma**0.5))

    network = GaussianResidualModel.fit(gaussian, scheduler, rank=4)  # the rest is the same in all directions
    values, vectors = torch.linalg.eigh(covariance)
    rest = values[:-4].mean()
    low_rank = vectors[:, -4:] @ torch.diag(values[-4:] - rest) @ vectors[:, -4:].T + rest * torch.eye(size)
    expected = exact_denoised(gaussian, low_rank, x, sigma)
    denoised = Denoiser.of(network, scheduler)(x, sigmas)
    torch.testing.assert_close(denoised, expected, rtol=0, atol=3e-4 * max(1, sigma**0.5))


def test_far_apart_points_are_taken_to_be_independent():
    torch.manual_seed(0)
    data, scheduler = torch.randn(30, 2, 3, 4).cumsum(3), AnnealedLangevinScheduler()
    x = data.double().flatten(1) - data.double().flatten(1).mean(0)
    covariance = x.T @ x / 29
    i, j = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), indexing="ij")
    i, j = i.flatten().repeat(2), j.flatten().repeat(2)  # of both channels
    taper = torch.exp(-((i[:, None] - i) ** 2 + (j[:, None] - j) ** 2) / (2 * 1.5**2)).double()

    def covariance_of(network):
        vectors = network.eigenvectors.double()
        return vectors.T @ torch.diag(network.eigenvalues.double()) @ vectors

    network = GaussianResidualModel.fit(data, scheduler, rank=24, correlation_length=1.5)
    torch.testing.assert_close(covariance_of(network), covariance * taper, rtol=0, atol=2e-5)
    network = GaussianResidualModel.fit(data, scheduler, rank=24, correlation_length=1.5, num_global_modes=2)
    values, vectors = torch.linalg.eigh(covariance)
    leading = vectors[:, -2:] @ torch.diag(values[-2:]) @ vectors[:, -2:].T
    torch.testing.assert_close(covariance_of(network), leading + (covariance - leading) * taper, rtol=0, atol=2e-5)


def test_the_correction_begins_at_zero_and_is_added(gaussian):
    scheduler, size = AnnealedLangevinScheduler(), tuple(gaussian.shape[2:])
    unet = {"block_out_channels": (8,), "norm_num_groups": 4}
    alone = GaussianResidualModel.fit(gaussian, scheduler, rank=4)
    network = GaussianResidualModel.fit(gaussian, scheduler, rank=4, unet=unet).eval()
    t = torch.tensor([3.0, 700.5])
    sigma = scheduler.t_to_sigma(t).reshape(-1, *[1] * (gaussian.ndim - 1))
    x = gaussian[:2] / (1 + sigma**2).sqrt()
    assert torch.equal(network(x, t).sample, alone(x, t).sample)
    with torch.no_grad():
        network.model.conv_out.weight.normal_()
    correction = network.model((gaussian[:2] - gaussian.mean(0)) / (1 + sigma**2).sqrt(), t).sample
    assert correction.std() > 0.1
    torch.testing.assert_close(network(x, t).sample, alone(x, t).sample + correction, rtol=1e-3, atol=1e-3)
    assert {name.split(".")[0] for name, _ in network.named_parameters()} == {"model"}
    assert network.config.sample_size == size


def test_bfloat16_training_leaves_the_gaussian_exact(gaussian):
    scheduler = AnnealedLangevinScheduler()
    network, t = GaussianResidualModel.fit(gaussian, scheduler, rank=8), torch.tensor([3.0, 700.5])
    expected = network(gaussian[:2], t).sample
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(gaussian[:2], t).sample, expected)


def test_a_gaussian_pipeline_draws_the_datas_mean_and_covariance(tmp_path):
    torch.manual_seed(0)
    data = 5 + 0.5 * torch.randn(200, 1, 2, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])
    scheduler = AnnealedLangevinScheduler()
    NCSNPipeline(GaussianResidualModel.fit(data, scheduler, rank=4), scheduler).save_pretrained(tmp_path)
    pipe = NCSNPipeline.from_pretrained(tmp_path)
    assert type(pipe.unet) is GaussianResidualModel
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = pipe(4000, 30, generator=generator, output_type="latent").images.flatten(1)
    torch.testing.assert_close(drawn.mean(0), data.flatten(1).mean(0), rtol=0, atol=0.04)
    torch.testing.assert_close(torch.cov(drawn.T), torch.cov(data.flatten(1).T), rtol=0, atol=0.02)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "ddim")
    NCSNPipeline.from_pretrained(tmp_path / "ddim")  # has the levels, too


@pytest.mark.parametrize(
    ("part", "changed", "message"),
    [
        ("unet", {"sigma_max": 20.0}, r"its 1000 levels from 0.01 to 20 are not the scheduler's, 1000 from 0.01 to 50"),
        ("unet", {"num_train_timesteps": 500}, r"its 500 levels .* are not the scheduler's, 1000"),
        ("scheduler", {"prediction_type": "epsilon"}, r"needs conditioning='timestep' and prediction_type='v_predict"),
        ("unet", {"rank": -1}, r"`rank` must be a whole number from 0"),
        ("unet", {"unet": {"layers_per_block": 0}}, r"`layers_per_block` must be a whole number from 1"),
    ],
)
def test_a_gaussian_of_other_levels_is_refused(part, changed, message, tmp_path):
    scheduler = AnnealedLangevinScheduler()
    network = GaussianResidualModel.fit(torch.randn(5, 1, 4), scheduler, rank=2)
    NCSNPipeline(network, scheduler).save_pretrained(tmp_path)
    path = tmp_path / part / ("config.json" if part == "unet" else "scheduler_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(OSError, match=message):
        NCSNPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"scheduler": AnnealedLangevinScheduler(prediction_type="score")}, "`scheduler`: its `prediction_type`"),
        ({"scheduler": AnnealedLangevinScheduler(conditioning="sigma")}, "`scheduler`: its `conditioning`"),
        ({"data": torch.full((3, 1, 4), math.nan)}, "`data` must be finite"),
        ({"data": torch.zeros(1, 1, 4)}, "`data` must be finite and at least 2 samples, and are 1"),
        ({"rank": 3}, r"`rank` must be from 1 to 2 .* \(3, 1, 4\), not 3"),
        ({"rank": 5, "correlation_length": 1.0}, "`rank` must be from 1 to 4"),
        ({"num_global_modes": 1}, "`num_global_modes`=1 needs `correlation_length`"),
        ({"data": torch.zeros(3, 1, 9000), "correlation_length": 1.0}, "at most 8,192 values, and a sample has 9,000"),
    ],
)
def test_what_has_no_gaussian_is_refused(settings, named):
    arguments = {"data": torch.zeros(3, 1, 4), "scheduler": AnnealedLangevinScheduler(), "rank": 1, **settings}
    with pytest.raises(ValueError, match=named):
        GaussianResidualModel.fit(**arguments)


def test_a_gaussian_of_impossible_settings_is_refused():
    with pytest.raises(ValueError, match="`rank` must be from 0 to 4"):
        GaussianResidualModel((4,), rank=5)
    with pytest.raises(ValueError, match="0 < `sigma_min` < `sigma_max`"):
        GaussianResidualModel((4,), rank=1, sigma_min=2.0, sigma_max=1.0)
    with pytest.raises(ValueError, match="`class_labels`"):
        GaussianResidualModel((4,), rank=1)(torch.zeros(1, 1, 4), 1.0, class_labels=torch.tensor([0]))
