"""What the tabs of the page do, without the page: pictures, their seeds, and errors that name a field."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dalle2_fast.cli import main
from dalle2_fast.data.images import to_pil
from dalle2_fast.demo.fields import FieldError
from dalle2_fast.demo.studio import MAX_NUMBER, Studio
from dalle2_fast.demo.uploads import read_painting

SETTINGS = {"number": 2, "seed": "7", "size": 32, "steps": 2, "guidance": 2.0}


def picture(color: str = "red", size: tuple[int, int] = (32, 32)) -> Image.Image:
    image = Image.new("RGB", size, color)
    image.paste("blue", (0, 0, size[0] // 3, size[1]))
    return image


def painting(painted: tuple[int, int, int, int], size: tuple[int, int] = (32, 32)) -> dict:
    layer = Image.new("RGBA", size)
    layer.paste((225, 29, 143, 255), painted)
    return {"background": picture(size=size), "layers": [layer], "composite": None}


def field_of(call) -> str:
    with pytest.raises(FieldError) as caught:
        call()
    return caught.value.field


def test_the_seed_under_a_picture_makes_it_again(studio, job, pipe):
    """Catches: a seed that is not the picture's, and a page that draws other pictures than a command."""
    drawing = studio.draw("a red ring", **SETTINGS)(job)
    assert drawing.captions == ["seed 7", "seed 8"] and drawing.seeds == [7, 8]
    assert list(drawing.seconds) == ["text", "prior", "decoder", "upsampler"]
    assert np.any(np.array(drawing.pictures[0]) != np.array(drawing.pictures[1]))
    for seed, shown in zip(drawing.seeds, drawing.pictures, strict=True):
        alone = pipe.generate("a red ring", 1, seed=seed, steps=2, guidance=2.0, size=32).images
        error = np.abs(np.array(to_pil(alone)[0], int) - np.array(shown, int))
        assert error.max() <= 1  # two rows may round differently from one
        assert shown.info == {"caption": "a red ring", "seed": str(seed)}


def test_an_empty_seed_is_another_one_each_time(studio, job):
    seeds = {studio.draw("a ring", **SETTINGS | {"number": 1, "seed": ""})(job).seeds[0] for _ in range(3)}
    assert len(seeds) == 3


def test_every_tab_draws(studio, job):
    """Catches: a tab whose fields the pipeline does not take."""
    frames = SETTINGS | {"number": 3}
    image, other = picture(), picture("green")
    for draw, captions in (
        (studio.variations(image, eta=0.5, **SETTINGS), ["seed 7", "seed 8"]),
        (studio.interpolate(image, other, **frames), ["theta 0.00", "theta 0.50", "theta 1.00"]),
        (studio.interpolate(image, other, noise="slerp", inversion_steps=2, **frames), None),
        (studio.text_diff(image, "a red ring", "a blue ring", 0.5, 2, **frames),
         ["theta 0.00", "theta 0.25", "theta 0.50"]),
        (studio.inpaint(painting((0, 0, 16, 32)), "a ring", **SETTINGS), ["seed 7", "seed 8"]),
        (studio.inpaint(painting((0, 0, 16, 32)), "", resample=2, **SETTINGS), ["seed 7", "seed 8"]),
        (studio.invert(image, "a ring", steps=3, refine=1), None),
        (studio.reconstruct(image, "0, 4 16", fit=40, **SETTINGS), None),
    ):  # fmt: skip
        drawing = draw(job)
        assert len(drawing.pictures) == len(drawing.captions)
        assert captions is None or drawing.captions == captions
        assert drawing.seconds and all(isinstance(shown, Image.Image) for shown in drawing.pictures)


def test_inversion_and_reconstruction_say_what_they_show(studio, job):
    inverted = studio.invert(picture(), "", steps=4)(job)
    assert [caption.split(",")[0] for caption in inverted.captions] == [
        "source", "noise", "sampled from the noise"
    ]  # fmt: skip
    assert inverted.captions[2].endswith(" dB")
    first = studio.reconstruct(picture(), "16", fit=40, **SETTINGS)(job)
    assert first.captions == ["16: 100.0% of variance"] and "components" in first.seconds
    again = studio.reconstruct(picture(), "16", fit=40, **SETTINGS)(job)
    assert "components" not in again.seconds  # they are kept


def test_inpainting_keeps_what_was_not_painted(studio, job):
    """Catches: a mask that is turned round, and one that is moved by the cut to a square."""
    drawing = studio.inpaint(painting((0, 0, 20, 32), (48, 32)), "a ring", **SETTINGS)(job)
    source = np.array(picture(size=(48, 32)))[:, 8:40]
    for shown in drawing.pictures:
        same = (np.array(shown) == source).all(axis=2)
        assert same[:, 12:].all() and not same[:, :12].all()


def test_a_faint_rim_of_the_brush_is_not_painted():
    layer = Image.new("RGBA", (8, 8), (255, 0, 0, 8))
    layer.paste((255, 0, 0, 255), (0, 0, 8, 4))
    _, mask = read_painting("painting", {"background": picture(size=(8, 8)), "layers": [layer]})
    assert torch.equal(mask[0, 0], torch.arange(8)[:, None].expand(8, 8) < 4)


def test_errors_name_their_field(studio):
    """Catches: an error below the wrong field, or one that appears only after the waiting time."""
    image, other = picture(), picture("green")
    texts = {"source": "a ring", "target": "a red ring"}
    for field, call in {
        "caption": lambda: studio.draw("a star", **SETTINGS),
        "number": lambda: studio.draw("a ring", **SETTINGS | {"number": MAX_NUMBER + 1}),
        "seed": lambda: studio.draw("a ring", **SETTINGS | {"seed": "seven"}),
        "steps": lambda: studio.draw("a ring", **SETTINGS | {"steps": 0}),
        "guidance": lambda: studio.draw("a ring", **SETTINGS | {"guidance": float("nan")}),
        "image": lambda: studio.variations(None, **SETTINGS),
        "eta": lambda: studio.variations(image, eta=2, **SETTINGS),
        "second": lambda: studio.interpolate(image, None, **SETTINGS),
        "target": lambda: studio.text_diff(image, "a ring", "a star", **SETTINGS),
        "source": lambda: studio.text_diff(image, "", "a ring", **SETTINGS),
        "theta": lambda: studio.text_diff(image, **texts, theta=-1, **SETTINGS),
        "inversion_steps": lambda: studio.interpolate(image, other, inversion_steps=1, **SETTINGS),
        "painting": lambda: studio.inpaint(painting((0, 0, 0, 0)), "a ring", **SETTINGS),
        "resample": lambda: studio.inpaint(painting((0, 0, 9, 9)), "a ring", resample=0, **SETTINGS),
        "refine": lambda: studio.invert(image, "", refine=9),
        "dims": lambda: studio.reconstruct(image, "4, x", **SETTINGS),
        "fit": lambda: studio.reconstruct(image, "4", fit=1, **SETTINGS),
    }.items():
        assert field_of(call) == field
    assert field_of(lambda: studio.text_diff(image, "a ring", "a  ring", **SETTINGS)) == "target"
    assert field_of(lambda: studio.inpaint(None, "a ring", **SETTINGS)) == "painting"
    assert field_of(lambda: studio.interpolate(image, other, **SETTINGS | {"number": 1})) == "number"


def test_an_unknown_word_is_answered_as_on_the_command_line(capsys):
    """Catches: two texts for one error."""
    from dalle2_fast.checkpoints import embedded_path, load_config
    from dalle2_fast.data import tokenizer_from_config

    class Pipe:
        tokenizer = tokenizer_from_config(load_config(embedded_path())["tokenizer"])

    studio = Studio.__new__(Studio)
    studio.pipe = Pipe
    for caption in ("a gren circle", "a white star on a white background", " "):
        with pytest.raises(FieldError) as caught:
            studio.draw(caption, **SETTINGS)
        assert main(["generate", caption]) == 2
        said = capsys.readouterr().err.strip().removeprefix("dalle2-fast: ").removeprefix("caption: ")
        assert str(caught.value) == said


def test_a_checkpoint_without_a_world_says_so(pipe):
    studio = Studio(pipe)
    studio.components = type(studio.components)(type("Pipe", (), {"metadata": {}}))
    assert field_of(lambda: studio.reconstruct(picture(), "4", **SETTINGS)) == "image"


@pytest.mark.parametrize("content", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_files_that_are_no_images(studio, tmp_path, content):
    """Catches: a traceback for a damaged upload, and PostScript, for which Pillow would start Ghostscript."""
    file = tmp_path / "upload.png"
    file.write_bytes(content)
    assert field_of(lambda: studio.variations(str(file), **SETTINGS)) == "image"
    half = tmp_path / "half.png"
    picture(size=(64, 64)).save(half)
    half.write_bytes(half.read_bytes()[:90])
    assert field_of(lambda: studio.variations(str(half), **SETTINGS)) == "image"
