"""docs/gallery.py: the command line and the checkpoint in the package accept its commands."""

from __future__ import annotations

import argparse
import importlib.util
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from dalle2_fast import cli
from dalle2_fast.checkpoints import embedded_path, load_config
from dalle2_fast.data import WordTokenizer, World

PATH = Path(__file__).resolve().parents[2] / "docs" / "gallery.py"
if not PATH.exists():
    pytest.skip("the gallery's script is in a checkout only", allow_module_level=True)
spec = importlib.util.spec_from_file_location("gallery", PATH)
gallery = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gallery)


@pytest.mark.parametrize("name", gallery.GALLERY)
def test_commands_are_understood(name):
    """Catches: a renamed option, or a word outside the checkpoint's vocabulary, before a whole run fails."""
    command, *arguments = gallery.GALLERY[name]
    parser = argparse.ArgumentParser()
    import_module(cli.COMMANDS[command][0]).add_arguments(parser)
    args = parser.parse_args([*arguments, "--seed", "0", "--dtype", "fp32"])
    tokenizer = WordTokenizer.from_config(load_config(embedded_path())["tokenizer"])
    captions = [getattr(args, option, None) for option in ("caption", "source", "target")]
    tokenizer.encode([caption for caption in captions if caption])
    images = [word for word in arguments if word.endswith(".png")]
    assert images and {Path(image).stem for image in images} <= set(gallery.SOURCES)


def test_sources_are_of_the_checkpoints_world(tmp_path):
    """Catches: a source image that the checkpoint was not trained on, or an empty one."""
    world = World.from_config(load_config(embedded_path())["metadata"]["world"])
    for chosen, _ in gallery.SOURCES.values():
        assert all(set(names) <= set(getattr(world, attribute)) for attribute, names in chosen.items())
    gallery.render_sources(tmp_path, 32)
    for name in gallery.SOURCES:
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == (32, 32) and len(image.getcolors(1024)) > 2


def test_images_keep_all_their_colours(tmp_path, monkeypatch):
    """With 48 colours the shading of an image looks like damage."""
    made = Image.linear_gradient("L").convert("RGB")
    asked = []

    def command_line(words):
        asked.append(words)
        made.save("made.png")
        return 0

    monkeypatch.setattr(cli, "main", command_line)
    monkeypatch.setattr(gallery, "render_sources", lambda folder: None)
    monkeypatch.setattr("sys.argv", ["gallery.py", "invert", "inpaint", "--out", str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    assert gallery.main() == 0
    with Image.open(tmp_path / "invert.png") as image:
        assert image.mode == "RGB" and image.tobytes() == made.tobytes()
    last = [words[len(words) - 1 - words[::-1].index("--seed") + 1] for words in asked]
    assert last == ["0", "0"]  # argparse takes the last one
