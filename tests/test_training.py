import os

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler
from PIL import Image

from ncsn_diffusers import AnnealedLangevinScheduler, NCSNPipeline, training
from ncsn_diffusers.training import TrainingConfig, make_unet, train


@pytest.fixture
def pictures(tmp_path):
    """40 gray pictures of 8×8: a bright left or a bright right half."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(40):
        array = np.zeros((8, 8), dtype=np.uint8)
        array[:, 4 * (i % 2) : 4 + 4 * (i % 2)] = 255
        Image.fromarray(array).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def small(pictures, tmp_path):
    def config(**arguments):
        defaults = {
            "train_data_dir": str(pictures),
            "output_dir": str(tmp_path / "out"),
            "block_out_channels": (16, 16),
            "train_batch_size": 20,
            "eval_batch_size": 3,
            "num_epochs": 2,
            "lr_warmup_steps": 1,
        }
        return TrainingConfig(**defaults | arguments)

    return config


def trained_weights(config):
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the mixed precision of a process's first run
    return torch.cat([p.detach().flatten() for p in train(config).unet.parameters()])


def test_learns_to_draw_two_pictures(small, tmp_path):
    train(small(num_epochs=200, learning_rate=5e-3))
    pipe = NCSNPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    for scheduler in (pipe.scheduler, DDIMScheduler.from_config(pipe.scheduler.config)):
        pipe.scheduler = scheduler
        images = pipe(batch_size=64, num_inference_steps=20, generator=generator, output_type="pt").images
        left, right = images[..., :4].mean((1, 2, 3)), images[..., 4:].mean((1, 2, 3))
        drawn_left, drawn_right = (left > 0.8) & (right < 0.2), (right > 0.8) & (left < 0.2)
        assert (drawn_left | drawn_right).float().mean() > 0.8
        # a fair coin: 64 tosses have a standard deviation of 4
        assert 16 < drawn_left.sum() < 48


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample", "score"])
@pytest.mark.parametrize("conditioning", ["timestep", "sigma"])
def test_every_convention_trains_and_is_saved(small, tmp_path, prediction_type, conditioning):
    train(small(prediction_type=prediction_type, conditioning=conditioning, sigma_max=20.0, num_train_timesteps=100))
    pipe = NCSNPipeline.from_pretrained(tmp_path / "out")
    config = pipe.scheduler.config
    assert (config.prediction_type, config.conditioning) == (prediction_type, conditioning)
    assert (config.num_train_timesteps, config.sigma_max) == (100, pytest.approx(20.0))
    assert pipe.unet.config.time_embedding_type == ("fourier" if conditioning == "sigma" else "positional")
    images = pipe(batch_size=2, num_inference_steps=3, output_type="pt").images
    assert images.isfinite().all()


def test_output_folder(small, tmp_path):
    train(small(num_epochs=1))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model_index.json", "unet", "scheduler", "samples.png", "loss.png"}
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    assert Image.open(tmp_path / "out" / "samples.png").size == (512, 512)  # 2 columns of 8 pixels, enlarged
    with pytest.raises(FileExistsError, match=r"`output_dir`=.* holds a pipeline already.*--overwrite_output_dir"):
        train(small())
    train(small(num_epochs=1, overwrite_output_dir=True))


def test_same_seed_same_weights(small):
    runs = [trained_weights(small(overwrite_output_dir=True, seed=s, random_flip=True)) for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize(
    "arguments",
    [
        {"use_ema": False},
        {"ema_max_decay": 0.5},
        {"ema_inv_gamma": 100.0},
        {"ema_power": 0.1},
        {"learning_rate": 1e-4},
        {"lr_scheduler": "constant"},
        {"lr_warmup_steps": 3},
        {"adam_beta1": 0.5},
        {"adam_beta2": 0.5},
        {"adam_epsilon": 1.0},
        {"adam_weight_decay": 10.0},
        {"random_flip": True},
        {"noise_distribution": "uniform"},
        {"log_sigma_mean": 1.0},
        {"log_sigma_std": 0.5},
        {"sigma_min": 0.1},
        {"train_batch_size": 10},
        {"mixed_precision": "bf16"},
    ],
)
def test_every_option_of_the_loop_changes_the_weights(small, arguments):
    plain = trained_weights(small())
    assert not torch.equal(plain, trained_weights(small(overwrite_output_dir=True, **arguments)))


def test_ema_averages_the_weights(small):
    # decay 0 keeps the last weights, as no average does
    last = trained_weights(small(use_ema=False))
    no_memory = trained_weights(small(overwrite_output_dir=True, ema_max_decay=0.0))
    torch.testing.assert_close(no_memory, last)


def test_colour_and_oblong_pictures(small, tmp_path):
    for i in range(20):
        Image.new("RGB", (12, 8), (i, 100, 200)).save(tmp_path / "pictures" / f"{i}.png")
    for i in range(20, 40):
        (tmp_path / "pictures" / f"{i}.png").unlink()
    pipe = train(small(num_epochs=1))
    assert pipe(num_inference_steps=2).images[0].size == (12, 8)
    pipe = train(small(num_epochs=1, overwrite_output_dir=True, resolution=16))
    assert pipe(num_inference_steps=2).images[0].size == (16, 16)
    assert pipe(num_inference_steps=2).images[0].mode == "RGB"


def test_accelerate_launch_does_not_leave_cores_idle(small, monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # the mark of `accelerate launch`
    torch.set_num_threads(1)
    try:
        train(small(num_epochs=1))
        assert torch.get_num_threads() == os.cpu_count()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("steps", [0, 2])
def test_interrupt_saves_what_has_been_trained(small, tmp_path, monkeypatch, capsys, steps):
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == steps + 1:
            raise KeyboardInterrupt
        return loss(*arguments)

    loss = training.score_matching_loss
    monkeypatch.setattr(training, "score_matching_loss", interrupted)
    train(small())
    assert f"Interrupted after {steps} of 4 steps" in capsys.readouterr().out
    assert (tmp_path / "out" / "model_index.json").exists()


def test_infinite_loss_stops_the_run(small, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "score_matching_loss", lambda model, *_: next(model.parameters()).sum() * torch.nan)
    with pytest.raises(FloatingPointError, match=r"The loss is nan after 4 steps"):
        train(small())
    assert not (tmp_path / "out" / "model_index.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction_type": "noise"}, r"`prediction_type` must be one of v_prediction, .*not 'noise'"),
        ({"conditioning": "noise"}, "`conditioning` must be one of"),
        ({"noise_distribution": "cosine"}, "`noise_distribution` must be one of lognormal, uniform, not 'cosine'"),
        ({"mixed_precision": "fp8"}, "`mixed_precision` must be one of no, fp16, bf16, not 'fp8'"),
        ({"lr_scheduler": "step"}, "`lr_scheduler` must be one of linear, cosine"),
        ({"train_batch_size": 0}, "`train_batch_size` must be at least 1, not 0"),
        ({"num_epochs": 0}, "`num_epochs` must be at least 1"),
        ({"resolution": -8}, "`resolution` must be at least 1, not -8"),
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0"),
        ({"ema_max_decay": 1.0}, "`ema_max_decay` must be at least 0 and below 1, not 1.0"),
        ({"block_out_channels": (30, 64)}, r"`block_out_channels` must be multiples of 8, not \(30, 64\)"),
        ({"block_out_channels": ()}, "`block_out_channels` must be multiples of 8"),
    ],
)
def test_bad_config(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**arguments)


def test_options_that_do_not_fit_the_data(small):
    with pytest.raises(ValueError, match=r"pictures of 8×8 cannot be halved 4 times.*multiples of 16"):
        train(small(block_out_channels=(8,) * 5))
    with pytest.raises(ValueError, match=r"`train_batch_size`=64 on 1 process\(es\) is more than the 40 pictures"):
        train(small(train_batch_size=64))
    with pytest.raises(ValueError, match=r"`sigma_min`=5.0 must be below `sigma_max`=2.0"):
        train(small(sigma_min=5.0, sigma_max=2.0))


def test_default_network_is_small_and_fits_digits():
    unet = make_unet(TrainingConfig(), 1, 28, 28)
    assert sum(p.numel() for p in unet.parameters()) < 1_500_000
    scheduler = AnnealedLangevinScheduler()
    x = torch.randn(2, 1, 28, 28)
    assert (
        unet(scheduler.scale_model_input(x, torch.tensor([3.0, 7.5])), torch.tensor([3.0, 7.5])).sample.shape == x.shape
    )
