"""CLIP tests, baselines, upsampler PSNR, and the command that runs them all."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from dalle2_fast import CLIP, DALLE2, Decoder, DiffusionPrior, Upsampler, cli
from dalle2_fast.data.synthetic.captions import compose, draw_phrasing, make_captions
from dalle2_fast.data.synthetic.rendering import render
from dalle2_fast.data.synthetic.scenes import has_held_out_pair, sample_scenes
from dalle2_fast.data.synthetic.vocabulary import SHAPES, WORDS
from dalle2_fast.data.synthetic.world import World
from dalle2_fast.data.text.tokenizer import WordTokenizer
from dalle2_fast.evaluation import measure
from dalle2_fast.evaluation.baselines import _bag, nearest_training_scenes
from dalle2_fast.evaluation.clip_scores import score_clip
from dalle2_fast.evaluation.measure import Amounts, evaluate
from dalle2_fast.evaluation.outlines import outline_iou
from dalle2_fast.evaluation.upsampling import score_upsampler

WORLD = World(
    shapes=["circle", "square", "ring"],
    colors=["red", "green", "blue"],  # held out: green circles, red rings
    fills=["solid"],
    relations=["left", "right", "above", "below"],
    backgrounds=["white", "gray"],
    textures=["plain"],
    kinds=["one", "two", "count"],
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bag_of_words(tokens):
    """Unit vectors that know which words a caption has, not in which order; a trace of noise breaks ties."""
    bag = torch.zeros(len(tokens), len(WORDS)).scatter_(1, tokens, 1.0)
    return F.normalize(bag + 1e-4 * torch.randn(bag.shape, generator=generator(9)), dim=1)


# Catches: 2-way tests that a bag of words passes (the reason why they exist), and tests that nobody can pass.
def test_a_bag_of_words_retrieves_but_does_not_bind():
    scenes = sample_scenes(300, generator(1), "iid")
    seen = bag_of_words(compose(scenes, draw_phrasing(300, generator(2), drop=0, canonical=True)))
    scores = score_clip(lambda images: seen, bag_of_words, scenes, world=World(), split="iid", resolution=8,
                        generator=generator(3))  # fmt: skip
    assert scores["retrieval"]["full"].rate > 0.5
    assert scores["two_way"]["change_color"].rate > 0.8
    for name in ("swap_colors", "swap_shapes", "binding"):
        assert 0.3 < scores["two_way"][name].rate < 0.7, name
    parts = [scores["two_way"][name] for name in ("swap_colors", "swap_shapes")]
    assert scores["two_way"]["binding"].of == sum(part.of for part in parts) > 50


# Catches: a caption that is as true of the image as the image's caption and is still called wrong.
def test_retrieving_another_true_caption_is_right():
    scenes = sample_scenes(40, generator(1), "iid", WORLD)
    twice = {key: torch.cat([value, value]) for key, value in scenes.items()}
    order = iter([torch.eye(40).roll(1, 0).repeat(2, 1), torch.eye(40).repeat(2, 1)])

    def encode_text(tokens):  # of retrieval: wrong captions, then those of the scene's twin; then anything
        return next(order, torch.ones(len(tokens), 40))

    options = dict(world=WORLD, split="iid", resolution=8, generator=generator(2))
    scores = score_clip(lambda images: torch.eye(40).repeat(2, 1), encode_text, twice, **options)
    assert scores["retrieval"]["full"].rate < 0.2
    assert scores["retrieval"]["natural"].rate > 0.45  # the first of the twins is found; phrasings may differ


# Catches: a memory that shows what training leaves out, or that does not find what it holds.
def test_the_nearest_training_caption():
    asked = sample_scenes(60, generator(4), "iid", World(**WORLD.to_config() | {"kinds": ["one"]}))
    tokens, says = make_captions(asked, generator(5))
    found = nearest_training_scenes(tokens, WORLD, generator(6), pool=3000)
    assert not has_held_out_pair(found).any()
    same = {key: (found[key] == asked[key]) for key in ("kind", "shape", "color", "pos", "bg")}
    assert same["kind"].float().mean() > 0.9
    assert (same["shape"] & same["color"])[:, 0].float().mean() > 0.9
    assert same["pos"][says["pos"]].float().mean() > 0.5  # chance: 0.11; "left of" looks the same in a bag
    assert same["bg"][says["bg"]].float().mean() > 0.7


def test_synonyms_are_one_concept_and_filler_none():
    words = WordTokenizer.scenes()
    captions = "a tiny crimson disk under a square", "a picture of a small red circle below a square"
    rows = words.encode(captions)
    assert torch.equal(*_bag(rows)) and _bag(rows)[0].sum() == 5


def test_an_upsampler_that_knows_the_truth_beats_bicubic_and_bicubic_equals_itself():
    scenes = sample_scenes(5, generator(1), "iid", WORLD)
    truth = render(scenes, 32)

    def oracle(low, first):
        return truth[first : first + len(low)]

    def bicubic(low, first):
        return F.interpolate(low, (32, 32), mode="bicubic").clamp(0, 1)

    score = score_upsampler(oracle, scenes, low=8, high=32, batch_size=2)
    assert score["psnr"] == 120.0 and 15 < score["psnr_bicubic"] < 45 and score["pictures"] == 5
    score = score_upsampler(bicubic, scenes, low=8, high=32)
    assert score["psnr"] == score["psnr_bicubic"]


# ------------------------------------------------------------------------------------------------ the command


def pipeline(world: World | None = WORLD, second: bool = False) -> DALLE2:
    """A whole pipeline with random weights that takes scene captions."""
    words = WordTokenizer.scenes(world)
    tower = dict(num_tokens=words.vocab_size, context_length=words.context_length, dim=16, depth=1, heads=2)
    unet = dict(out_channels=3, patch_size=2, channels=(16, 16), layers_per_block=1, num_groups=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DALLE2(
            CLIP(dim_text=16, dim_image=16, dim_latent=16, num_text_tokens=words.vocab_size,
                 text_seq_len=words.context_length, text_enc_depth=1, text_heads=2, visual_enc_depth=1,
                 visual_heads=2, visual_image_size=16, visual_patch_size=8),
            DiffusionPrior(dict(dim=16, depth=1, heads=2, dim_head=8, text_dim=16,
                                context_length=words.context_length), image_embed_dim=16),
            Decoder(dict(in_channels=3, attention_levels=(1,), head_dim=8, cross_dim=16, **unet),
                    image_size=16, image_embed_dim=16, num_image_tokens=2, text_encoder=tower,
                    prediction="v_prediction", variance="fixed_small"),
            Upsampler(dict(in_channels=6, attention_levels=(), **unet), image_size=32, low_res_size=16),
            words,
            sampling=dict(steps=2, prior_steps=2, upsampler_steps=2, guidance=2.0),
            metadata={} if world is None else {"world": world.to_config()},
            upsampler2=Upsampler(dict(in_channels=6, attention_levels=(), **unet), image_size=64,
                                 low_res_size=32) if second else None,
        )  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return pipeline().save_pretrained(tmp_path_factory.mktemp("checkpoint"))


SMALL = "--captions 8 --clip-captions 20 --training-captions 100 --pictures 2 --outlines 1 --quiet".split()


# Catches: a pipeline with a second upsampler that cannot be scored; the first one is.
def test_a_second_upsampler_does_not_matter(tmp_path, capsys):
    path = pipeline(second=True).save_pretrained(tmp_path)
    command = ["evaluate", "--checkpoint", str(path), *SMALL, "--parts", "upsampler", "--device", "cpu"]
    assert cli.main(command) == 0
    assert "PSNR" in capsys.readouterr().out


# Catches: anything that breaks between the checkpoint, the scores, the table and the file.
def test_the_command_writes_a_complete_report(checkpoint, tmp_path, capsys):
    output = tmp_path / "scores.json"
    command = ["evaluate", "--checkpoint", str(checkpoint), *SMALL, "--seed", "3", "--steps", "1",
               "--guidance-interval", "-5", "1", "--device", "cpu", "--output", str(output)]  # fmt: skip
    assert cli.main(command) == 0
    table = capsys.readouterr().out
    assert "one object: color" in table and "two-way binding" in table and "PSNR" in table
    assert "IoU with the ideal shape, 3 images" in table and "log-SNR" in table
    report = json.loads(output.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert report["captions"] == 8 and report["seed"] == 3
    assert report["versions"]["torch"] == torch.__version__
    assert report["sampling"]["steps"] == 1 and report["sampling"]["guidance"] == 2.0
    assert report["sampling"]["guidance_interval"] == [-5.0, 1.0]
    assert report["world"] == WORLD.to_config()
    for split in ("iid", "comp"):
        accuracy = report["caption_accuracy"][split]
        assert set(accuracy) == {"generated", "renders", "shuffled", "nearest"}
        assert sum(accuracy["generated"][kind]["everything"]["of"] for kind in accuracy["generated"]) == 8
        assert "fill" not in accuracy["renders"].get("one", {})  # one fill: nothing to get right
        assert report["clip"][split]["retrieval"]["full"]["of"] == 20
    assert all(math.isfinite(report["upsampler"][name]) for name in ("psnr", "psnr_bicubic"))
    outlines, denoising = report["outline_scores"], report["denoising"]
    assert set(outlines["generated"]["by_shape"]) == {"circle", "square", "ring"}
    assert outlines["captions"] == 3
    assert outlines["renders"]["worst"] > 0.5  # 16 pixels are few
    assert list(denoising["psnr"]) == ["-2", "0", "2", "4", "6", "8"] and denoising["pictures"] == 2
    assert all(math.isfinite(value) for value in denoising["psnr"].values())
    assert list(denoising["outline_iou"]) == list(denoising["psnr"]) and denoising["outlines"] == 3
    assert all(0 <= value <= 1 for value in denoising["outline_iou"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_outlines_of_denoised_images_are_scored_against_their_own_scenes(monkeypatch):
    """Catches: shapes of other scenes, images in another order, a world without outlines that fails."""
    given = []

    def known(decoder, images, *conditions):
        given.append(images)
        assert all(len(values) == len(images) for values in conditions)
        return iter([(0, images), (1, torch.zeros_like(images))])

    monkeypatch.setattr(measure, "denoise_once", known)
    options = dict(amounts=Amounts(6, 10, 50, 6, 1), parts=("denoising",), progress=False)
    found = evaluate(pipeline().eval(), WORLD, **options)["denoising"]
    assert found["outlines"] == 6 == len(given[1]) and found["psnr"]["1"] < 40 < found["psnr"]["0"]
    shape = torch.tensor([SHAPES.index(name) for name in WORLD.shapes] * 2)
    assert found["outline_iou"] == {"0": round(outline_iou(given[1], shape).mean().item(), 4), "1": 0}
    plain = World(shapes=["circle"], fills=["solid"], textures=["dotted"], kinds=["one"])
    found = evaluate(pipeline(plain).eval(), plain, splits=("iid",), **options)["denoising"]
    assert found["outline_iou"] is None is found["outlines"] and found["psnr"]["1"] < 40


# Catches: scores that change from run to run, or with the order in which things are scored.
def test_the_same_seed_gives_the_same_scores():
    pipe, small = pipeline().eval(), Amounts(6, 10, 50, 1, 1)
    options = dict(amounts=small, parts=("captions",), progress=False, batch_size=3)
    both = evaluate(pipe, WORLD, **options)["caption_accuracy"]
    again = evaluate(pipe, WORLD, splits=("comp",), **options)["caption_accuracy"]
    assert again["comp"] == both["comp"]
    other = evaluate(pipe, WORLD, splits=("comp",), seed=1, **options)["caption_accuracy"]
    assert other["comp"] != both["comp"]


def test_a_world_without_held_out_pairs_has_no_comp_split(tmp_path, capsys):
    world = World(**WORLD.to_config() | {"shapes": ["circle"], "colors": ["red", "blue"]})
    folder = pipeline(world).save_pretrained(tmp_path / "checkpoint")
    assert cli.main(["evaluate", "--checkpoint", str(folder), *SMALL, "--parts", "clip"]) == 0
    assert "comp" not in capsys.readouterr().out
    assert cli.main(["evaluate", "--checkpoint", str(folder), *SMALL, "--splits", "comp"]) == 2
    assert "comp is empty" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "complaint"), [
    (["--captions", "0"], "--captions: expected at least 1, got 0"),
    (["--seed", "-1"], "--seed: expected 0 to"),
    (["--output", "scores.txt"], "--output: expected a name that ends in .json"),
    (["--output", "nowhere/scores.json"], "--output: the folder"),
    (["--device", "cuda:99"], "--device: expected a device of this machine, got cuda:99"),
    (["--guidance", "-1"], "guidance: expected a finite number >= 0"),
    (["--checkpoint", "nowhere"], "nowhere: no such checkpoint folder"),
])  # fmt: skip
def test_users_errors_are_one_line_and_code_2(checkpoint, options, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "--checkpoint", str(checkpoint), *SMALL, *options]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_knows_no_world_is_refused(tmp_path, capsys):
    folder = pipeline(None).save_pretrained(tmp_path)
    assert cli.main(["evaluate", "--checkpoint", str(folder), *SMALL]) == 2
    assert "with their world in its metadata" in capsys.readouterr().err
