"""Train the digit classifier of ncsn_diffusers.evaluation: `python scripts/train_digit_classifier.py --help`."""

from pathlib import Path

import torch
import tyro
from datasets import load_dataset
from safetensors.torch import save_file
from torch.nn import functional as F  # noqa: N812
from tqdm.auto import tqdm

from ncsn_diffusers.data import decode_images
from ncsn_diffusers.evaluation import DigitClassifier
from ncsn_diffusers.images import to_model_range


def main(
    dataset_name: str = "ylecun/mnist",
    output_path: str = "digit_classifier.safetensors",
    num_epochs: int = 20,
    batch_size: int = 128,
    learning_rate: float = 4e-3,
    seed: int = 0,
):
    """
    Train on the `train` split, print the accuracy on the `test` split and save the weights in half precision.

    Args:
        dataset_name: A data set of 28×28 grayscale images with labels from 0 to 9, such as digits or Fashion-MNIST, on
            the Hub or in a folder.
        output_path: Where the weights go, as safetensors.
        num_epochs: Passes over the train split.
        batch_size: Digits per step.
        learning_rate: AdamW's peak learning rate, of the one-cycle schedule.
        seed: Of the weights, the order of the digits and their distortions.
    """
    if not Path(output_path).absolute().parent.is_dir():
        raise FileNotFoundError(f"`output_path`={output_path!r} is not in a folder that exists.")
    dataset = load_dataset(dataset_name)
    images, labels = decode_images(dataset["train"]), torch.tensor(dataset["train"]["label"][:])

    torch.manual_seed(seed)
    network = DigitClassifier().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.02)
    steps_an_epoch = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_epochs * steps_an_epoch)
    with tqdm(total=num_epochs * steps_an_epoch, desc="Training", unit="step", mininterval=5) as bar:
        for _ in range(num_epochs):
            for batch in torch.randperm(len(images))[: steps_an_epoch * batch_size].split(batch_size):
                loss = F.cross_entropy(network(distort(images[batch])), labels[batch])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update()

    state = {name: value.half() if value.is_floating_point() else value for name, value in network.state_dict().items()}
    save_file({name: value.contiguous() for name, value in state.items()}, output_path)
    network.load_state_dict(state)  # what was saved is what is tested
    print(f"test accuracy {accuracy(network, dataset['test']):.2%}; weights in {output_path}")


def distort(images: torch.Tensor) -> torch.Tensor:
    """
    Randomly rotated (±0.2 rad), sheared (±0.15), scaled (0.85 to 1.15) and shifted (±2.5 pixels) digits.

    Args:
        images (`torch.Tensor` of shape `(n, 1, height, width)`): uint8.

    Returns:
        `torch.Tensor` of the same shape: float32 in [-1, 1].
    """

    def uniform(limit):
        return (2 * torch.rand(len(images)) - 1) * limit

    angle, shear, scale_x, scale_y = uniform(0.2), uniform(0.15), 1 + uniform(0.15), 1 + uniform(0.15)
    pixel = 2 / images.shape[-1]
    row_x = torch.stack([scale_x * angle.cos(), scale_x * (shear - angle.sin()), uniform(2.5 * pixel)], 1)
    row_y = torch.stack([scale_y * angle.sin(), scale_y * angle.cos(), uniform(2.5 * pixel)], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), list(images.shape), align_corners=False)
    # the padding is 0, so the background must be 0 while the image is distorted
    return F.grid_sample(images / 255, grid, align_corners=False) * 2 - 1


@torch.no_grad()
def accuracy(network: DigitClassifier, dataset) -> float:
    """The share of a data set's digits that the network classifies correctly."""
    network.eval()
    images, labels = to_model_range(decode_images(dataset)), torch.tensor(dataset["label"][:])
    predicted = torch.cat([network(batch).argmax(1) for batch in images.split(500)])
    return (predicted == labels).float().mean().item()


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True)
