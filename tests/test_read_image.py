"""One file has the same values in training, image to image, inpainting and evaluation."""

import io
import struct

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from networks import quiet_pipeline, small_unet
from PIL import Image

from ncsn_diffusers import NCSNInpaintPipeline, NCSNPipeline
from ncsn_diffusers.data import decode_images, load_training_data
from ncsn_diffusers.evaluation import EvaluateConfig
from ncsn_diffusers.evaluation.evaluate import find_real_source, load_real_images
from ncsn_diffusers.image_files import find_white, read_image, read_mask

SIDE = 4  # of the images, whose rows are all alike unless they are turned


def rows(*values, dtype="uint8"):
    return np.array([values] * SIDE, dtype)


def encode(image, kind="PNG", **arguments):
    file = io.BytesIO()
    image.save(file, kind, **arguments)
    return file.getvalue()


def tiff_12_bit(values):
    """A TIFF of one gray row repeated, with 12 bits a pixel, which Pillow reads but does not write."""
    row = "".join(f"{value:012b}" for value in values)
    data = bytes(int(row[i : i + 8], 2) for i in range(0, len(row), 8)) * SIDE
    short, long = 3, 4
    entries = [
        (256, short, len(values)),
        (257, short, SIDE),
        (258, short, 12),  # BitsPerSample
        (259, short, 1),
        (262, short, 1),
        (273, long, 8),
        (277, short, 1),
        (278, short, SIDE),
        (279, long, len(data)),
    ]
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", len(entries)) + table + bytes(4)


def palette(transparency=None):
    image = Image.fromarray(rows(0, 1, 2, 0)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    return encode(image, **({} if transparency is None else {"transparency": transparency}))


def exif_rotated():
    """Stored with its top at the right: to be turned by a quarter against the clock."""
    image = Image.fromarray(np.repeat(np.repeat(np.array([[0, 255]], "uint8"), 8, 1), 16, 0))  # left black, right white
    exif = Image.Exif()
    exif[0x0112] = 8
    return encode(image, "JPEG", exif=exif, quality=100)


def gray_and_alpha(values, alpha):
    return Image.merge("LA", [Image.fromarray(rows(*values)), Image.fromarray(rows(*alpha))])


def color(*pixels):
    return Image.fromarray(np.array([pixels] * SIDE, "uint8"))


GRAY = {
    "8-bit": (encode(Image.fromarray(rows(0, 1, 128, 255))), [0, 1, 128, 255]),
    "1-bit": (encode(Image.fromarray(rows(0, 255, 255, 0)).convert("1")), [0, 255, 255, 0]),
    "16-bit PNG": (encode(Image.fromarray(rows(0, 257, 32768, 65535, dtype="uint16"))), [0, 1, 128, 255]),
    "16-bit TIFF": (encode(Image.fromarray(rows(0, 256, 5140, 9999, dtype="uint16")), "TIFF"), [0, 1, 20, 39]),
    "16-bit PGM": (b"P5 4 4 65535\n" + rows(0, 257, 32768, 65535, dtype=">u2").tobytes(), [0, 1, 128, 255]),
    "16-bit PNG, transparent": (
        encode(Image.fromarray(rows(0, 257, 32768, 65535, dtype="uint16")), transparency=257),
        [0, 255, 128, 255],
    ),
    "12-bit TIFF": (tiff_12_bit([0, 16, 2048, 4095]), [0, 1, 128, 255]),
    "dark 12-bit TIFF": (tiff_12_bit([0, 16, 32, 48]), [0, 1, 2, 3]),
    "int32 TIFF of 8 bits": (encode(Image.fromarray(rows(0, 1, 128, 255, dtype="int32")), "TIFF"), [0, 1, 128, 255]),
    "int32 TIFF of 16 bits": (encode(Image.fromarray(rows(0, 257, 514, 65535, dtype="int32")), "TIFF"), [0, 1, 2, 255]),
    "float TIFF to 1": (encode(Image.fromarray(rows(0, 1 / 255, 0.5, 1, dtype="float32")), "TIFF"), [0, 1, 128, 255]),
    "float TIFF to 255": (encode(Image.fromarray(rows(0, 1, 128, 255, dtype="float32")), "TIFF"), [0, 1, 128, 255]),
    "gray and alpha": (encode(gray_and_alpha([100] * 4, [0, 51, 255, 255])), [255, 224, 100, 100]),
}
COLOUR = {
    "RGB": (encode(color((1, 2, 3), (4, 5, 6), (7, 8, 9), (0, 0, 0))), [(1, 2, 3), (4, 5, 6), (7, 8, 9), (0, 0, 0)]),
    "RGBA": (
        encode(color((100, 0, 50, 0), (100, 0, 50, 51), (100, 0, 50, 255), (0, 0, 0, 0))),
        [(255, 255, 255), (224, 204, 214), (100, 0, 50), (255, 255, 255)],
    ),
    "palette": (palette(), [(10, 20, 30), (40, 50, 60), (70, 80, 90), (10, 20, 30)]),
    "transparent palette": (
        palette(bytes([0, 255, 51])),
        [(255, 255, 255), (40, 50, 60), (218, 220, 222), (255, 255, 255)],
    ),
    "CMYK": (
        encode(Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0)), "TIFF"),
        [(255, 0, 0)] * SIDE,
    ),
}
ALPHA = {
    "RGBA": (COLOUR["RGBA"][0], [(100, 0, 50, 0), (100, 0, 50, 51), (100, 0, 50, 255), (0, 0, 0, 0)]),
    "RGB": (COLOUR["RGB"][0], [(1, 2, 3, 255), (4, 5, 6, 255), (7, 8, 9, 255), (0, 0, 0, 255)]),
    "gray": (GRAY["8-bit"][0], [(value, value, value, 255) for value in (0, 1, 128, 255)]),
    "16-bit": (GRAY["16-bit PNG"][0], [(value, value, value, 255) for value in (0, 1, 128, 255)]),
    "gray and alpha": (GRAY["gray and alpha"][0], [(100, 100, 100, alpha) for alpha in (0, 51, 255, 255)]),
    "transparent palette": (
        COLOUR["transparent palette"][0],
        [(10, 20, 30, 0), (40, 50, 60, 255), (70, 80, 90, 51), (10, 20, 30, 0)],
    ),
}
CASES = [
    pytest.param(channels, content, expected, id=f"{channels} channels, {name}")
    for channels, table in ((1, GRAY), (3, GRAY), (3, COLOUR), (4, ALPHA))
    for name, (content, expected) in table.items()
]


def save(tmp_path, content):
    path = tmp_path / "images" / ("0.tiff" if content[:2] == b"II" else "0.pgm" if content[:2] == b"P5" else "0.png")
    path.parent.mkdir()
    path.write_bytes(content)
    return path


def pipeline(cls, channels, side=SIDE):
    return quiet_pipeline(small_unet(channels=channels, out_channels=channels, sample_size=side), cls=cls)


def four_readings(path, channels, monkeypatch, side=SIDE):
    """The file's 8-bit values, (channels, height, width), as each of the four sees them."""
    folder = str(path.parent)
    readings = {"training": decode_images(load_training_data(train_data_dir=folder), channels=channels)[0]}

    config = EvaluateConfig("", train_data_dir=folder, channels=channels, held_out_split="train", num_images=1)
    shape = (channels, side, side)
    readings["evaluation"] = load_real_images(
        config, find_real_source(config, "", shape), Accelerator(cpu=True), shape, num_classes=None
    ).reference[0]

    pipe, seen = pipeline(NCSNPipeline, channels, side), []
    prepare = pipe._prepare_latents

    def spy(batch_size, chain, image, *arguments):
        seen.append(image)
        return prepare(batch_size, chain, image, *arguments)

    monkeypatch.setattr(pipe, "_prepare_latents", spy)
    pipe(image=Image.open(path), num_inference_steps=2, strength=0.5)
    readings["image to image"] = ((seen[0][0] + 1) * 127.5).round().byte()

    mask = np.zeros((side, side), "uint8")
    mask[-1] = 255  # the last row is drawn
    inpaint = pipeline(NCSNInpaintPipeline, channels, side)
    known = inpaint(Image.open(path), Image.fromarray(mask), num_inference_steps=1, output_type="pt").images[0]
    readings["inpainting"] = torch.cat([(known * 255).round().byte()[:, :-1], readings["training"][:, -1:]], 1)
    return readings


@pytest.mark.parametrize(("channels", "content", "expected"), CASES)
def test_one_file_has_the_same_values_everywhere(tmp_path, monkeypatch, channels, content, expected):
    expected = torch.tensor(expected, dtype=torch.uint8).reshape(SIDE, -1).T[:, None].expand(channels, SIDE, SIDE)
    for reader, values in four_readings(save(tmp_path, content), channels, monkeypatch).items():
        assert torch.equal(values, expected), (reader, values[:, 0])


def test_exif_orientation(tmp_path, monkeypatch):
    for reader, values in four_readings(save(tmp_path, exif_rotated()), 1, monkeypatch, side=16).items():
        assert values.shape == (1, 16, 16), reader
        assert (values[0, :8] > 250).all(), reader  # what was at the right is on top
        assert (values[0, 8:-1] < 5).all(), reader


@pytest.mark.parametrize("name", ["1-bit", "16-bit PNG", "12-bit TIFF", "float TIFF to 1", "int32 TIFF of 16 bits"])
def test_masks_are_read_alike(name):
    """Drawn is what is white in the mask."""
    content, expected = GRAY[name]
    pipe = pipeline(NCSNInpaintPipeline, 1)
    image = torch.full((1, 1, SIDE, SIDE), 0.25)
    drawn = pipe(image, Image.open(io.BytesIO(content)), num_inference_steps=2, output_type="pt").images != 0.25
    assert drawn[0, 0, 0].tolist() == [value >= 128 for value in expected]


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (rows(0, 4095, dtype="uint16"), "mode I;16 that holds 0 to 4095"),
        (rows(3, 200, dtype="uint16"), "holds 3 to 200"),
        (rows(0, 4095, dtype="int32"), "mode I that holds 0 to 4095"),
        (rows(0, 70_000, dtype="int32"), "holds 0 to 70000"),
        (rows(-1, 200, dtype="int32"), "holds -1 to 200"),
        (rows(-1, 1, dtype="float32"), "mode F that holds -1 to 1"),
        (rows(0, 1.5, dtype="float32"), r"holds 0 to 1\.5"),
        (rows(0, 4095, dtype="float32"), "holds 0 to 4095"),
        (rows(0, np.nan, dtype="float32"), "holds nan to nan"),
        (rows(0, np.inf, dtype="float32"), "holds 0 to inf"),
    ],
)
def test_uncertain_ranges_are_refused_and_named(tmp_path, array, found):
    image = Image.fromarray(array)
    with pytest.raises(ValueError, match=f"an image of .*{found}: what is white in it is not certain"):
        read_image(image)
    with pytest.raises(ValueError, match=found):
        pipeline(NCSNPipeline, 1)(image=image)
    with pytest.raises(ValueError, match=found):
        decode_images(load_training_data(train_data_dir=str(save(tmp_path, encode(image, "TIFF")).parent)))


@pytest.mark.parametrize(
    ("mode", "pixels", "expected"),
    [
        ("L", [0, 100, 200, 255], [0, 100, 200, 255]),
        ("L", [0, 1, 1, 0], [0, 255, 255, 0]),
        ("L", [0, 0, 0, 0], [0, 0, 0, 0]),
        # white and opaque
        ("LA", [(0, 0), (255, 0), (0, 255), (255, 255)], [0, 0, 0, 255]),
        ("RGBA", [(0, 0, 0, 0), (255, 255, 255, 0), (0, 0, 0, 255), (255, 255, 255, 255)], [0, 0, 0, 255]),
        ("RGBA", [(255, 255, 255, 102), (255, 255, 255, 204), (0, 0, 0, 204), (0, 0, 0, 0)], [102, 204, 0, 0]),
        # opaque all over: shades of gray are what they are in an image without transparency
        ("LA", [(0, 255), (100, 255), (200, 255), (255, 255)], [0, 100, 200, 255]),
    ],
)
def test_white_and_opaque_is_what_a_mask_says(mode, pixels, expected):
    image = Image.new(mode, (4, 1))
    image.putdata(pixels)
    mask = read_mask(image)
    assert mask.mode == "L" and np.asarray(mask)[0].tolist() == expected


def test_a_picture_with_a_hole_is_no_mask():
    image = Image.new("LA", (4, 1))
    image.putdata([(90, 255), (130, 255), (160, 255), (0, 0)])
    with pytest.raises(ValueError, match="a mask with transparency must be black and white where it is opaque"):
        read_mask(image)


def test_black_is_black():
    for dtype in ("uint16", "int32", "float32"):
        image = Image.fromarray(np.zeros((2, 2), dtype))
        assert find_white(image) is None
        assert np.asarray(read_image(image)).tolist() == [[0, 0]] * 2


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_every_mode_can_be_read(mode):
    image = Image.new(mode, (2, 3))
    for channels, result in ((1, "L"), (3, "RGB"), (4, "RGBA")):
        assert read_image(image, channels).mode == result
    if mode not in ("LA", "La", "PA", "RGBA", "RGBa"):
        assert read_image(image, 4).getchannel("A").getextrema() == (255, 255)
    assert read_image(image).mode == ("L" if mode in ("1", "L", "LA", "La") else "RGB")
