"""Image files of the command line: PNG files written whole or not at all, default names."""

from __future__ import annotations

import os

import pytest
from PIL import Image

from dalle2_fast.cli.image_files import default_file_name, save_png


def test_failed_write_keeps_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    save_png(Image.new("RGB", (2, 2), "red"), path, {"caption": "ring é"})
    with Image.open(path) as picture:
        assert picture.text["caption"] == "ring é"

    def half(self, file, **options):
        open(file, "wb").write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="x.png: cannot be written .No space left on device"):
        save_png(Image.new("RGB", (2, 2), "blue"), path, {})
    assert os.listdir(tmp_path) == ["x.png"]
    with Image.open(path) as picture:
        assert picture.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("caption", "name"),
    [
        ("A red ring, above!", "a-red-ring-above-7.png"),
        ("../../etc", "etc-7.png"),
        ("???", "picture-7.png"),
        ("x" * 300, "x" * 60 + "-7.png"),
    ],
)
def test_file_name(caption, name):
    assert default_file_name(caption, 7) == name
