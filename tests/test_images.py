"""What training, pipelines and evaluation share: 8 bits, PIL images, the grid."""

import math

import numpy as np
import pytest
import torch
from diffusers.utils import make_image_grid
from PIL import Image

from ncsn_diffusers.images import class_columns, make_grid, to_pil, to_uint8


def random_images(n, channels=1, height=3, width=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=generator)


def test_images_are_quantized_as_in_a_file():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels), levels)
    for offset in (-0.49, 0.49):
        assert torch.equal(to_uint8(((levels + offset) / 255).clamp(0, 1)), levels)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.tensor([-1.0, 1.0]), r"must lie in \[0, 1\], not from -1 to 1"),
        (torch.tensor([0.5, math.nan]), r"must lie in \[0, 1\], not from nan"),
        (torch.tensor([0, 255]), r"not torch\.int64"),
    ],
)
def test_images_that_are_not_in_range(images, message):
    with pytest.raises(ValueError, match=message):
        to_uint8(images)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pil_images_hold_the_same_values(channels, mode):
    images = random_images(2, channels)
    converted = to_pil(images)
    assert [image.mode for image in converted] == [mode] * 2
    arrays = np.stack([np.asarray(image).reshape(3, 5, channels) for image in converted])
    assert torch.equal(torch.from_numpy(arrays).permute(0, 3, 1, 2), images)


# --- The grid ---


@pytest.mark.parametrize(("n", "num_columns", "shape"), [(6, None, (2, 3)), (9, None, (3, 3)), (6, 6, (1, 6))])
def test_full_grid_is_that_of_diffusers(n, num_columns, shape):
    for channels in (1, 3):
        images = to_pil(random_images(n, channels))
        grid = make_grid(images, num_columns)
        expected = make_image_grid(images, *shape).convert(images[0].mode)
        assert grid.mode == images[0].mode
        assert np.array_equal(np.asarray(grid), np.asarray(expected))


def test_unused_places_are_black_and_transparency_is_kept():
    images = random_images(3, 4)
    grid = torch.from_numpy(np.array(make_grid(to_pil(images)))).permute(2, 0, 1)
    expected = torch.zeros(4, 6, 10, dtype=torch.uint8)
    expected[:, :3, :5], expected[:, :3, 5:], expected[:, 3:, :5] = images
    assert torch.equal(grid, expected)


def test_columns_of_classes():
    assert [class_columns(n) for n in (None, 1, 3, 4, 10, 16, 17)] == [None, None, None, 4, 10, 16, None]
    images = to_pil(random_images(3))
    assert make_grid(images, num_columns=10).size == (3 * 5, 3)  # no empty columns


def test_margins_are_white():
    images = random_images(3)
    grid = torch.from_numpy(np.array(make_grid(to_pil(images), num_columns=2, margin=2)))
    expected = torch.full((2 * 3 + 3 * 2, 2 * 5 + 3 * 2), 255, dtype=torch.uint8)
    expected[2:5, 2:7], expected[2:5, 9:14], expected[7:10, 2:7] = images[:, 0]
    assert torch.equal(grid, expected)


@pytest.mark.parametrize(("min_width", "scale"), [(0, 1), (26, 2), (27, 3), (36, 3), (37, 4)])
def test_small_images_are_enlarged_by_whole_pixels(min_width, scale):
    images = to_pil(random_images(3))
    grid = make_grid(images, num_columns=2, margin=2, min_width=min_width)
    large = [image.resize((5 * scale, 3 * scale), Image.Resampling.NEAREST) for image in images]
    assert np.array_equal(np.asarray(grid), np.asarray(make_grid(large, num_columns=2, margin=2)))
    assert grid.width == 10 * scale + 6 >= min_width


def test_titles_stand_above_their_columns():
    images = to_pil(random_images(4, 3))
    plain = np.asarray(make_grid(images, num_columns=2, margin=2, min_width=200))
    grid = np.asarray(make_grid(images, num_columns=2, margin=2, min_width=200, titles=["σ = 5", ""]))
    assert np.array_equal(grid[20:], plain)
    dark = np.argwhere(grid[:20].min(2) < 128)
    assert len(dark) and abs(dark[:, 1].mean() - 52) < 5 and dark[:, 1].max() < 102  # of the first column alone
    with pytest.raises(ValueError, match="`titles` must be one for each of the 2 columns, not 3"):
        make_grid(images, num_columns=2, titles=["a", "b", "c"])


def test_titles_stand_beside_their_rows():
    images = to_pil(random_images(4, 3))
    plain = np.asarray(make_grid(images, num_columns=2, margin=2, min_width=200))
    titles = ["", "a", "two\nlines"]
    with pytest.raises(ValueError, match="`row_titles` must be one for each of the 2 rows, not 3"):
        make_grid(images, num_columns=2, row_titles=titles)
    grid = np.asarray(
        make_grid(images, num_columns=2, margin=2, min_width=200, titles=titles[:2], row_titles=titles[1:])
    )
    left = grid.shape[1] - plain.shape[1]
    assert np.array_equal(grid[20:, left:], plain)
    beside = grid[20:, :left].min(2) < 128
    first, second = np.argwhere(beside[: len(plain) // 2]), np.argwhere(beside[len(plain) // 2 :])
    assert len(first) and abs(first[:, 0].mean() - len(plain) / 4) < 4
    assert len(second) and abs(second[:, 0].mean() - len(plain) / 4) < 4
    assert np.ptp(second[:, 0]) > 2 * np.ptp(first[:, 0])  # two lines
    assert abs(first[:, 1].max() - second[:, 1].max()) <= 2 and beside.nonzero()[1].max() < left - 1  # right-aligned
    above = np.argwhere(grid[:20].min(2) < 128)
    assert abs(above[:, 1].mean() - (left + 2 + 102 + 50)) < 5  # of the second column alone


@pytest.mark.parametrize(
    ("titles", "row_titles", "scale"),
    [(("a", "b"), (), 1), (("standard deviation", "b"), (), 5), ((), ("1\n2\n3", "b"), 3), (("a", "b"), ("c", "d"), 1)],
)
def test_images_are_enlarged_until_their_titles_fit(titles, row_titles, scale):
    images = to_pil(torch.zeros(4, 1, 16, 24, dtype=torch.uint8))
    grid = np.asarray(make_grid(images, 2, margin=2, titles=titles, row_titles=row_titles))
    black = (grid == 0).sum(1)  # titles are antialiased, so that they hardly have pure black
    assert (black >= 2 * 24 * scale).sum() == 2 * 16 * scale and black.max() < 2 * 24 * scale + 24


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([Image.new("RGB", (4, 4))], "`images` must be of one mode and size, not L 4×4, RGB 4×4"),
        ([Image.new("L", (4, 5))], "`images` must be of one mode and size, not L 4×4, L 4×5"),
    ],
)
def test_images_that_do_not_make_a_grid(others, message):
    with pytest.raises(ValueError, match=message):
        make_grid([Image.new("L", (4, 4)), *others])
    with pytest.raises(ValueError, match="not an empty list"):
        make_grid([])
