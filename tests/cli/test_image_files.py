"""Image files of the command line: PNG files written whole or not at all, default names."""

from __future__ import annotations

import os

import pytest
from PIL import Image

from dalle2_fast.cli import image_files
from dalle2_fast.cli.image_files import check_space, check_writable, default_file_name, save_image


def test_failed_write_keeps_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    save_image(Image.new("RGB", (2, 2), "red"), path, {"caption": "ring é"})
    with Image.open(path) as picture:
        assert picture.text["caption"] == "ring é"

    def half(self, file, **options):
        open(file, "wb").write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="x.png: cannot be written .No space left on device"):
        save_image(Image.new("RGB", (2, 2), "blue"), path, {})
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


def test_a_file_name_that_is_no_text_is_escaped_in_the_file(tmp_path):
    save_image(Image.new("RGB", (2, 2)), tmp_path / "x.png", {"image": "caf\udcff.png"})
    with Image.open(tmp_path / "x.png") as image:
        assert image.text["image"] == "caf\\udcff.png"


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "x" * 250 + ".png", "x" * 300 + "/x.png"])
def test_a_name_that_is_too_long_is_refused_before_the_work(tmp_path, name):
    """250 letters are allowed, but not with the ending of the temporary file."""
    with pytest.raises(OSError, match="--output: .*File name too long"):
        check_writable(tmp_path / name, "--output")
    assert os.listdir(tmp_path) == []


def test_checking_leaves_nothing_and_changes_nothing(tmp_path):
    (tmp_path / "x.png").write_text("old")
    check_writable(tmp_path / "x.png", "--output")
    check_writable(tmp_path / "new" / "folder" / "x.png", "--output")
    assert os.listdir(tmp_path) == ["x.png"] and (tmp_path / "x.png").read_text() == "old"


def test_a_full_disk_is_named_before_the_work(tmp_path, monkeypatch):
    class Usage:
        free = 3 * 64**2 * 3

    monkeypatch.setattr(image_files.shutil, "disk_usage", lambda folder: Usage)
    check_space(tmp_path / "new", 3, 64, "--output")
    with pytest.raises(OSError, match="--output: 36,864 bytes are free there, and 4 images may need 49,152"):
        check_space(tmp_path / "new", 4, 64, "--output")
