"""The commands that begin with an image, on a tiny random pipeline: what they write, what they refuse."""

from __future__ import annotations

import json
import os
import re
import time

import numpy as np
import pytest
from PIL import Image

from dalle2_fast import DALLE2, Decoder, cli
from tests.support.tiny_pipeline import tiny_pipeline


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_pipeline().save_pretrained(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def command(checkpoint, tmp_path, monkeypatch, capsys):
    """command(*arguments) -> exit code, printed lines as a dict, stderr; in a folder with some images."""
    monkeypatch.chdir(tmp_path)
    for name, size in (("a.png", (32, 32)), ("b.jpg", (32, 32)), ("wide.png", (60, 40))):
        noise = np.random.default_rng(len(name)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(name)
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 24, 32))
    mask.save("mask.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:1000])

    def run(*arguments, seed="1", output="out.png"):
        shared = ["--checkpoint", str(checkpoint), "--device", "cpu", "--quiet", "--output", output]
        code = cli.main([*arguments, *shared, *(["--seed", seed] if seed else [])])
        out, err = capsys.readouterr()
        return code, dict(line.split(":", 1) for line in out.splitlines()), err

    return run


COMMANDS = {
    "variations": ["variations", "a.png", "--num-images", "2"],
    "interpolate": ["interpolate", "a.png", "b.jpg", "--frames", "3"],
    "text-diff": ["text-diff", "a.png", "--from", "a red ring", "--to", "a blue ring", "--frames", "2",
                  "--inversion-steps", "2"],
    "invert": ["invert", "a.png", "--steps", "2"],
    "reconstruct": ["reconstruct", "a.png", "--dims", "0,4,16", "--pca-images", "40"],
    "inpaint": ["inpaint", "a.png", "a red ring", "--mask", "mask.png", "--num-images", "2"],
    "generate": ["generate", "a red ring", "--init-image", "a.png", "--num-images", "2", "--strength", "0.5"],
}  # fmt: skip
# Images in the grid: the results and the images that they are compared with.
SHOWN = {"variations": 3, "interpolate": 5, "text-diff": 3, "invert": 3, "reconstruct": 4, "inpaint": 4,
         "generate": 3}  # fmt: skip


def test_the_report_counts_all_seconds(command, monkeypatch):
    """`reconstruct` took 48 s and reported 5: what is done between the stages was not counted."""
    inner = DALLE2.fit_pca

    def slow(self, *args, **options):
        time.sleep(0.5)
        return inner(self, *args, **options)

    monkeypatch.setattr(DALLE2, "fit_pca", slow)
    embed = DALLE2.reconstruct
    monkeypatch.setattr(DALLE2, "reconstruct", lambda *a, **k: time.sleep(0.5) or embed(*a, **k))
    begin = time.perf_counter()
    _, printed, _ = command(*COMMANDS["reconstruct"])
    spent = time.perf_counter() - begin
    seconds = {name: float(value) for name, value in re.findall(r"([a-z-]+) (\d+\.\d\d)", printed["seconds"])}
    total = float(printed["seconds"].rpartition(" ")[2])
    del seconds["all"]
    assert seconds["components"] >= 0.5 and seconds["rest"] >= 0.5 and "decoder" in seconds
    assert sum(seconds.values()) == pytest.approx(total, abs=0.05) and total == pytest.approx(spent, abs=0.2)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_shows_its_source_beside_its_results(command, name):
    code, printed, err = command(*COMMANDS[name], "--individual", "each")
    assert code == 0, err
    shown, side = SHOWN[name], 256 if name == "invert" else 32
    assert printed["image"].strip() == f"{os.path.abspath('out.png')} ({shown} of {side} x {side})"
    assert printed["seed"].strip() == "1" and "in all" in printed["seconds"] and "cpu" in printed["device"]
    with Image.open("out.png") as grid:
        each, rest = divmod(grid.width + 4, shown)  # a row; a cell is as wide as the widest line of text
        assert rest == 0 and each >= side + 4 and grid.height == side + 14
        assert grid.text["seed"] == "1"
        guidance = json.loads(grid.text["settings"])["guidance"]
        assert guidance == (1.0 if name in ("text-diff", "invert") else 2.0)
    files = sorted(os.listdir("each"))
    assert len(files) == shown
    with Image.open("a.png") as source, Image.open(f"each/{files[0]}") as first:
        assert np.abs(np.asarray(source.resize((16, 16), Image.Resampling.BICUBIC) if side == 256 else source)
                      .astype(int).mean() - np.asarray(first).astype(int).mean()) < 2  # fmt: skip
        if side == 32:
            assert (np.asarray(first) == np.asarray(source)).all()
    results = [np.asarray(Image.open(f"each/{file}")).astype(int) for file in files]
    assert any(np.abs(result - results[0]).mean() > 5 for result in results[1:])


def test_the_seed_decides_and_a_run_without_one_draws_it(command):
    for output, seed in (("1.png", "4"), ("2.png", "4"), ("3.png", "5")):
        assert command(*COMMANDS["variations"], output=output, seed=seed)[0] == 0
    one, two, three = (np.asarray(Image.open(f"{index}.png")) for index in (1, 2, 3))
    assert (one == two).all() and (one != three).any()
    seeds = [command(*COMMANDS["variations"], seed=None)[1]["seed"] for _ in range(2)]
    assert seeds[0] != seeds[1]


def test_inpainting_keeps_what_the_mask_or_the_box_does_not_cover(command):
    for where, kept in ((["--mask", "mask.png"], np.s_[:8]), (["--box", "0.5,0,1,1"], np.s_[:, :16])):
        code, _, err = command(
            "inpaint", "a.png", *where, "--num-images", "1", "--resample", "2", "--jump", "1",
            "--individual", "each",
        )  # fmt: skip
        assert code == 0, err
        source, result = (np.asarray(Image.open(file)) for file in ("a.png", "each/002.png"))
        assert (result[kept] == source[kept]).all()
        assert np.abs(result.astype(int) - source).mean() > 5


def test_the_method_s_spelling_is_understood(command):
    assert command("text_diff", *COMMANDS["text-diff"][1:])[0] == 0


def test_what_is_done_to_a_picture_is_said(command):
    code, _, err = command("variations", "wide.png", "--num-images", "1")
    assert code == 0
    assert err == (
        "note: wide.png is 60 x 40: its central 40 x 40 is used, resized to 32 x 32 (bicubic, antialiased)\n"
    )
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save("clear.png")
    err = command("variations", "clear.png", "--num-images", "1")[2]
    assert "transparency laid on white" in err
    with Image.open("out.png") as grid:
        assert grid.getpixel((5, 5)) == (255, 255, 255)


def test_components_from_a_folder(command):
    os.mkdir("folder")
    for index in range(5):
        Image.new("RGB", (20, 30), (index * 40, 0, 90)).save(f"folder/{index}.png")
    open("folder/notes.txt", "w").close()
    assert command("reconstruct", "a.png", "--dims", "1,16", "--pca-folder", "folder")[0] == 0
    os.mkdir("empty")
    code, _, err = command("reconstruct", "a.png", "--pca-folder", "empty")
    assert code == 2 and "--pca-folder: expected at least 2 images in empty, found 0" in err


@pytest.mark.parametrize("name", COMMANDS)
def test_the_guidance_interval_arrives(command, name, monkeypatch):
    """Catches: a command with --guidance that does not take the interval, or keeps it to itself."""
    seen, inner = [], Decoder.sample

    def spy(self, *args, **options):
        seen.append(options["guidance_interval"])
        return inner(self, *args, **options)

    monkeypatch.setattr(Decoder, "sample", spy)
    code, _, err = command(*COMMANDS[name], "--guidance-interval", "-4.5", "1")
    assert code == 0, err
    assert seen == [(-4.5, 1.0)]
    with Image.open("out.png") as grid:
        written = json.loads(grid.text["settings"])
    assert written["guidance_interval"] == [-4.5, 1.0]


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    for option in ("--seed", "--output", "--device", "--dtype", "--checkpoint", "--individual", "--quiet"):
        assert option in out, option


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["variations", "nowhere.png"], "image: no such file: nowhere.png"),
        (["variations", "."], "image: . is a folder, expected an image"),
        (["variations", "text.png"], "image: text.png is not an image that Pillow can read"),
        (["variations", "half.png"], "image: half.png cannot be read"),
        (["variations", "a.png", "--size", "100"], "size: expected one of 16, 32, got 100"),
        (["variations", "a.png", "--caption", "a zebra"], "zebra"),
        (["interpolate", "a.png", "nowhere.png"], "second: no such file: nowhere.png"),
        (["interpolate", "a.png", "b.jpg", "--frames", "1"], "--frames: expected at least 2, got 1"),
        (["text-diff", "a.png", "--from", "a ring", "--to", "a ring"], "expected captions that differ"),
        (["text-diff", "a.png", "--from", "a zebra", "--to", "a ring"], "zebra"),
        (["invert", "a.png", "--steps", "1"], "--steps: expected at least 2, got 1"),
        (["variations", "a.png", "--guidance-interval", "1", "-1"], "guidance_interval: expected finite"),
        (["invert", "a.png", "--guidance-interval", "nan", "1"], "guidance_interval: expected finite"),
        (["reconstruct", "a.png", "--dims", "17"], "--dims: expected numbers of up to 16 components, got 17"),
        (["reconstruct", "a.png", "--pca-folder", "a.png"], "--pca-folder: a.png is not a folder"),
        (["inpaint", "a.png", "--mask", "wide.png"], "expected the image's size 32 x 32, got 60 x 40"),
        (["inpaint", "a.png", "--box", "0,0,0.001,1"], "expected something to repaint, got nothing"),
        (["inpaint", "a.png", " ", "--mask", "mask.png"], "caption: expected words"),
        (["generate", "a ring", "--strength", "0.5"], "--strength: expected together with --init-image FILE"),
        (["generate", "a ring", "--init-image", "text.png"], "--init-image: text.png is not an image"),
    ],
)
def test_refused(command, arguments, says):
    code, printed, err = command(*arguments)
    assert (code, printed) == (2, {})
    assert err.startswith("dalle2-fast: ") and says in err and err.count("\n") == 1
    assert not os.path.exists("out.png")


@pytest.mark.parametrize(
    "arguments",
    [
        ["variations", "a.png", "--eta", "1.5"],
        ["text-diff", "a.png", "--from", "a ring"],
        ["text-diff", "a.png", "--from", "a", "--to", "b", "--theta", "x"],
        ["reconstruct", "a.png", "--dims", "1,x"],
        ["reconstruct", "a.png", "--guidance-interval", "1"],
        ["generate", "a ring", "--prior-guidance-interval", "-1", "x"],
        ["inpaint", "a.png"],
        ["inpaint", "a.png", "--box", "0.5,0,0.5,1"],
        ["inpaint", "a.png", "--box", "0,0,1,1", "--mask", "mask.png"],
        ["generate", "a ring", "--init-image", "a.png", "--strength", "0"],
        ["invert"],
    ],
)
def test_refused_by_the_parser(command, arguments, capsys):
    with pytest.raises(SystemExit) as end:
        command(*arguments)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("dalle2-fast ") and err.count("\n") == 1
