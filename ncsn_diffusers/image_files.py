"""The one reader of image files: what training, pipelines, evaluation and the demo page see of a PIL image."""

import numpy as np
from PIL import Image, ImageOps


def exceeds_pixels(image: Image.Image) -> bool:
    """Whether an image that is not yet decoded has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, which may be None."""
    return Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS


def check_pixels(image: Image.Image) -> None:
    """
    Refuse an image that is not yet decoded if it has too many pixels: a small file can take gigabytes of memory.

    Args:
        image (`PIL.Image.Image`): as `PIL.Image.open` returns it.

    Raises:
        ValueError: it has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, the one limit, by default 89,478,485.
    """
    if exceeds_pixels(image):
        raise ValueError(
            f"the image has {image.width}×{image.height} pixels, more than the limit of {Image.MAX_IMAGE_PIXELS:,}. "
            "Make it smaller; where it is to be trusted, PIL.Image.MAX_IMAGE_PIXELS raises the limit."
        )


def find_white(image: Image.Image) -> float | None:
    """
    The value of white in an image of more than 8 bits, whose black is 0.

    | values | white |
    | --- | --- |
    | integers of 12 or 14 bits, as the file's header says | 4095 or 16383 |
    | 16-bit integers | 65535 |
    | 32-bit integers up to 255, or up to 65535 | 255, or 65535 |
    | floating point up to 1, or whole numbers up to 255 | 1, or 255 |

    Integers whose largest value is from 256 to 4095 (from 1 to 4095 with 16 bits) are refused: a dark image of 16 bits
    looks the same as a bright one of 8 or 12 bits.

    Returns:
        `float`, or None if the image has 8 bits, or is black all over.

    Raises:
        ValueError: white is not certain, or values are negative or not finite; the message gives their range.
    """
    if not is_deep(image):
        return None
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if low == high == 0:
        return None
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = tags.get(258, (0,))[0]  # BitsPerSample
    if low >= 0 and image.mode == "F":
        if high <= 1:
            return 1.0
        if high <= 255 and (values == np.rint(values)).all():
            return 255.0
    elif low >= 0:
        if 8 < bits < 16:
            return 2.0**bits - 1
        # Pillow before 11.3 opens 16-bit PNGs in the mode of 32 bits, as all versions do with PGMs.
        if image.mode == "I" and image.format not in ("PNG", "PPM") and high <= 255:
            return 255.0
        if 4096 <= high <= 65535:
            return 65535.0
    raise ValueError(
        f"an image of mode {image.mode} that holds {low:g} to {high:g}: what is white in it is not certain. Floating "
        "point may hold 0 to 1, or whole numbers to 255; integers of 16 bits 0 to 65535, with the largest at 4096 or "
        "above; those of 32 bits these or 0 to 255. Scale it yourself and save it with 8 bits."
    )


def read_image(image: Image.Image, channels: int | None = None) -> Image.Image:
    """
    Any PIL image with 8 bits a channel, as training, image to image, inpainting and evaluation all see it.

    It is turned upright as its EXIF orientation says; more than 8 bits are scaled (see [`find_white`]) and rounded;
    palettes become colors; what is transparent is laid on white, unless `channels` is 4. An image without transparency
    is opaque in 4 channels.

    Args:
        image (`PIL.Image.Image`): of any mode.
        channels (`int`, *optional*): 1, 3 or 4; the image's own, 1 or 3, when not given.

    Returns:
        `PIL.Image.Image` of mode L, RGB or RGBA.

    Raises:
        ValueError:
            The image has too many pixels, see [`check_pixels`], the range of its values is not certain, or PIL cannot
            convert its mode.
    """
    check_pixels(image)
    white = find_white(image)  # first: the upright copy lacks the file's tags
    if image.getexif().get(0x0112, 1) != 1:  # Orientation
        image = ImageOps.exif_transpose(image)
    if is_deep(image):
        values, transparent = np.asarray(image), image.info.get("transparency")
        eight_bits = np.empty(values.shape, dtype=np.uint8)
        for rows in np.array_split(np.arange(len(values)), -(-len(values) // 256)):  # without a copy of all in float64
            eight_bits[rows] = np.rint(values[rows].astype(np.float64) * (255 / (white or 1)))
        image = Image.fromarray(eight_bits)
        if transparent is not None:  # the one gray value that a PNG names
            image.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    if image.mode in ("La", "LAB"):  # La goes to LA alone, and LAB would have no opacity in RGBA
        image = image.convert("LA" if image.mode == "La" else "RGB")
    channels = channels or (1 if image.mode in ("1", "L", "LA") else 3)
    if channels != 4 and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])


def is_deep(image: Image.Image) -> bool:
    """Whether it has more than 8 bits a channel."""
    return image.mode == "F" or image.mode.startswith("I")


def read_mask(image: Image.Image) -> Image.Image:
    """
    What a mask means, from any PIL image: what is white *and* opaque is to be drawn.

    Args:
        image (`PIL.Image.Image`): of any mode. The two values 0 and 1 stand for black and white.

    Returns:
        `PIL.Image.Image` of mode L, black where the mask is black or transparent.

    Raises:
        ValueError: the image has transparency and shades of gray, so that it may be a picture with a hole, or, as
            [`read_image`], the range of its values is not certain.
    """
    if not image.has_transparency_data:
        gray = read_image(image, 1)
        values = np.asarray(gray)
        return gray if values.max() != 1 else Image.fromarray(values * np.uint8(255))
    values = np.asarray(read_image(image, 4).convert("LA"), dtype=np.float32) / 255
    white, opaque = values[..., 0], values[..., 1]
    seen = opaque > 0.5
    if not seen.all() and seen.any() and ((white > 0.2) & (white < 0.8))[seen].mean() > 0.25:
        raise ValueError(
            "a mask with transparency must be black and white where it is opaque: what is white and opaque is drawn. "
            "This one has shades of gray, as a picture with a hole. Save the mask without transparency."
        )
    return Image.fromarray(np.rint(white * opaque * 255).astype(np.uint8))
