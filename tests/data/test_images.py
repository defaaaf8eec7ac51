"""Images in and out: every mode of Pillow, EXIF, masks, sizes, grids."""

from __future__ import annotations

import pytest
import torch
from PIL import Image, UnidentifiedImageError

from dalle2_fast.data.image_formats import open_image
from dalle2_fast.data.images import (
    GRID_GAP,
    as_images,
    as_mask,
    from_pil,
    image_grid,
    resized_mask,
    to_pil,
)


def close(a, b, atol):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def test_images_of_every_mode():
    red = torch.tensor([1.0, 0.0, 0.0])
    for mode, colour, wanted in [
        ("RGB", (255, 0, 0), red),
        ("RGBA", (255, 0, 0, 0), torch.ones(3)),  # clear: the white beneath shows
        ("LA", (0, 255), torch.zeros(3)),
        ("L", 51, torch.full((3,), 0.2)),
        ("1", 1, torch.ones(3)),
        ("I;16", 13107, torch.full((3,), 0.2)),
        ("F", 0.25, torch.full((3,), 0.25)),
        ("CMYK", (0, 0, 0, 255), torch.zeros(3)),
    ]:
        tensor = from_pil(Image.new(mode, (3, 2), colour))
        assert tensor.shape == (1, 3, 2, 3) and tensor.dtype == torch.float32
        close(tensor[0, :, 0, 0], wanted, 1e-6)
    palette = Image.new("RGB", (2, 2), "blue").convert("P")
    assert from_pil(palette)[0, :, 0, 0].tolist() == [0, 0, 1]


def test_a_turned_camera_is_turned_back():
    upright = Image.new("RGB", (2, 1), "black")
    upright.putpixel((1, 0), (255, 255, 255))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    turned.info["exif"] = exif.tobytes()
    assert torch.equal(from_pil(turned), from_pil(upright))


def test_round_trip_and_masks():
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    close(from_pil(to_pil(image)[0]), image, 1e-6)
    mask = torch.zeros(8, 8)
    mask[3, 5] = 1
    given = as_mask("mask", mask, "cpu")
    assert resized_mask(given, 4)[0, 0].nonzero().tolist() == [[1, 2]]  # one pixel of four is enough
    assert resized_mask(given, 16).sum() == 4
    light = Image.new("L", (8, 8), 0)
    light.putpixel((5, 3), 200)
    assert torch.equal(as_mask("mask", light, "cpu"), given)
    with pytest.raises(ValueError, match="mask: expected 0 .keep. and 1 .repaint. only"):
        as_mask("mask", mask * 0.5, "cpu")
    with pytest.raises(ValueError, match="image: expected images of one size, got 2 x 2, 3 x 3"):
        as_images("image", [Image.new("RGB", (2, 2)), Image.new("RGB", (3, 3))], "cpu")


@pytest.mark.parametrize(("count", "size"), [(1, (8, 6)), (2, (20, 6)), (3, (20, 16)), (5, (32, 16))])
def test_grid(count, size):
    pictures = [Image.new("RGB", (8, 6), (index, 0, 0)) for index in range(count)]
    sheet = image_grid(pictures)
    assert sheet.size == size
    assert sheet.getpixel((0, 0)) == (0, 0, 0)
    if count > 1:
        assert sheet.getpixel((12, 0)) == (1, 0, 0) and sheet.getpixel((9, 0)) == (255, 255, 255)


def test_labels_do_not_run_into_each_other():
    """Catches: labels of small images that are printed over each other."""
    red, blue = (Image.new("RGB", (16, 16), color) for color in ("red", "blue"))
    one = image_grid([red], labels=["of variance 17.7%"])
    two = image_grid([red, blue], labels=["of variance 17.7%"] * 2)
    assert two.width == 2 * one.width + GRID_GAP > 100
    first, second = (two.crop((x, 16, x + one.width, two.height)) for x in (0, one.width + GRID_GAP))
    assert first.tobytes() == second.tobytes() == one.crop((0, 16, one.width, one.height)).tobytes()


def test_postscript_is_no_image(tmp_path):
    """Pillow starts Ghostscript, an interpreter, for it: the file of another person would be a program."""
    file = tmp_path / "a.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    assert Image.open(file).format == "EPS"
    with pytest.raises(UnidentifiedImageError):
        open_image(file)
