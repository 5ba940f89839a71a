"""A judge of drawn digits, trained on the embedded digits in about a minute on two cores."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from ncsn_diffusers.data import decode_images, load_training_data, to_model_range


def train_digit_classifier(num_epochs=8, batch_size=100, held_out=1000):
    """
    A small convolutional network and its accuracy on 1,000 digits held out of the 10,000.

    Returns:
        `tuple`: the network, from pictures of shape (n, 1, 28, 28) in [-1, 1] to logits (n, 10), and the accuracy.
    """
    dataset = load_training_data()
    images, labels = to_model_range(decode_images(dataset)), torch.tensor(dataset["label"][:])
    train_images, train_labels = images[held_out:], labels[held_out:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(*_block(1, 16), nn.MaxPool2d(2), *_block(16, 32), nn.MaxPool2d(2), *_block(32, 64))
        network = nn.Sequential(network, nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(64 * 9, 10))
        num_steps = num_epochs * len(train_images) // batch_size
        optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=num_steps)
        for _ in range(num_epochs):
            for batch in torch.randperm(len(train_images)).split(batch_size):
                shift = tuple(torch.randint(-2, 3, (2,)).tolist())
                logits = network(train_images[batch].roll(shift, (2, 3)))
                F.cross_entropy(logits, train_labels[batch]).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    network.eval()
    with torch.no_grad():
        accuracy = (network(images[:held_out]).argmax(1) == labels[:held_out]).float().mean().item()
    return network, accuracy


def _block(channels_in, channels_out):
    return nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.ReLU()


@torch.no_grad()
def judge(classifier, images):
    """
    How sure the classifier is of pictures in [0, 1] of shape (n, 1, 28, 28), on average, and how many of each digit
    there are.
    """
    probabilities = classifier(images * 2 - 1).softmax(1)
    sureness, digits = probabilities.max(1)
    return sureness.mean().item(), digits.bincount(minlength=10).tolist()
