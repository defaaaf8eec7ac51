"""The command `train` on the preset `tiny`, end to end. Each test names the fault it would catch."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from dalle2_fast.cli import main
from dalle2_fast.data import World
from dalle2_fast.models import DALLE2, ARPrior, Decoder
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.recipes import STAGES
from dalle2_fast.training.run_folder.initial import load_initial
from dalle2_fast.training.weights import load_weights, save_weights
from tests.support.tiny_pipeline import load_on_cpu


def test_train_all_makes_a_pipeline_that_draws(trained):
    """Catches: stages that do not fit together, weights of the wrong dtype, a world that is not recorded."""
    pipeline = load_on_cpu(trained)
    images = pipeline("a red circle", num_images=2, seed=0, steps=2, prior_steps=2)
    assert images.shape == (2, 3, 32, 32)
    config = json.loads((trained / "config.json").read_text())
    assert config["metadata"]["preset"] == "tiny"
    assert World(**config["metadata"]["world"]).shapes == ("circle", "square")
    for stage in STAGES:
        rows = [json.loads(line) for line in (trained / stage / "log.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [2, 4]
        assert {"loss", "lr", "grad_norm", "images_per_s", "seconds", "samples"} <= set(rows[0])
    assert "two_way" in rows_of(trained, "clip")[-1]
    assert "psnr_bicubic" in rows_of(trained, "upsampler")[-1]
    assert (trained / "decoder" / "samples" / "step-0000004.png").exists()


def rows_of(out, stage):
    return [json.loads(line) for line in (out / stage / "log.jsonl").read_text().splitlines()]


def test_the_finished_weights_are_the_average(trained):
    """Catches: publishing the raw weights."""
    for stage in STAGES:
        _, tensors = load_weights(trained / stage / "model.safetensors")
        state = torch.load(trained / stage / "state.pt", weights_only=True)
        assert all(torch.equal(tensors[name], value) for name, value in state["ema"]["average"].items())
        assert any(not torch.equal(tensors[name], value) for name, value in state["model"].items())


def test_decoder_and_prior_need_clip(tmp_path, capsys):
    """Catches: a traceback, or half a folder left behind."""
    for stage in ("prior", "decoder"):
        arguments = ["train", stage, "--preset", "tiny", "--out", str(tmp_path), "--device", "cpu"]
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "clip/model.safetensors not found: first train it: dalle2-fast train clip --out" in error
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "--preset: expected one of scenes-cpu, scenes-gpu, tiny"),
        (
            ["--preset", "tiny", "--device", "cuda:99"],
            "--device: expected a device of this machine, got cuda:99",
        ),
        (["--preset", "tiny", "--device", "tpu"], "--device: expected auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--preset", "tiny", "--steps", "0"], "steps: expected a number above 0, got 0"),
        (["--preset", "tiny", "--threads", "0"], "--threads: expected at least 1, got 0"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(tmp_path, capsys, arguments, message):
    """Catches: tracebacks on the command line."""
    assert main(["train", "clip", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_existing_state_needs_resume_and_unwritable_out(trained, tmp_path, capsys):
    """Catches: silently overwriting a run; finding out late that nothing can be written."""
    arguments = ["train", "clip", "--preset", "tiny", "--device", "cpu", "--quiet", "--out"]
    assert main([*arguments, str(trained)]) == 2
    assert "already holds a training state: add --resume" in capsys.readouterr().err
    (tmp_path / "file").write_text("in the way")
    assert main([*arguments, str(tmp_path / "file")]) == 2
    assert "--out: cannot write to" in capsys.readouterr().err


def test_an_initialised_prior_has_the_statistics_of_its_own_clip(trained, tmp_path):
    """Catches: a prior started from another that standardises by the embeddings of that one's CLIP."""
    config, tensors = load_weights(trained / "prior" / "model.safetensors")
    foreign = tensors | {"clip_mean": tensors["clip_mean"] + 1.0, "clip_std": tensors["clip_std"] * 3.0}
    save_weights(tmp_path / "foreign.safetensors", config, foreign)
    shutil.copytree(trained / "clip", tmp_path / "clip")
    args = ["train", "prior", "--preset", "tiny", "--out", str(tmp_path), "--device", "cpu", "--quiet"]
    assert main([*args, "--init", str(tmp_path / "foreign.safetensors")]) == 0
    _, tuned = load_weights(tmp_path / "prior" / "model.safetensors")
    for name in ("clip_mean", "clip_std"):
        torch.testing.assert_close(tuned[name], tensors[name])


def test_init_and_freeze_tune_one_tower(trained, tmp_path):
    """Catches: --init ignored, a frozen tower that moves (weight decay, Muon), a tuned one that does not."""
    before = load_weights(trained / "clip" / "model.safetensors")[1]
    args = ["train", "clip", "--preset", "tiny", "--out", str(tmp_path), "--quiet", "--device", "cpu"]
    init = ["--init", str(trained / "clip" / "model.safetensors")]
    assert main([*args, *init, "--freeze", "visual."]) == 0
    config, after = load_weights(tmp_path / "clip" / "model.safetensors")
    assert config["freeze"] == ["visual."]
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith("visual."), name


def test_init_gives_a_trained_decoder_a_fine_level(trained, tmp_path, capsys):
    """Catches: a fine level that cannot start from a net without one; other weights missing unnoticed."""
    path = trained / "decoder" / "model.safetensors"
    config, weights = load_weights(path)
    fine = dict(patch_size=1, channels=8, layers=1)
    grown = Decoder(**config["model"] | dict(unet=config["model"]["unet"] | dict(fine=fine)))
    load_initial(grown, path)
    assert f"{path} has no unet.fine, which starts from initial weights" in capsys.readouterr().out
    assert all(torch.equal(grown.state_dict()[name], value) for name, value in weights.items())
    weights.pop("unet.conv_in.bias")
    save_weights(tmp_path / "part.safetensors", config, weights)
    with pytest.raises(TrainingError, match="unet.conv_in.bias"):
        load_initial(grown, tmp_path / "part.safetensors")


def test_init_from_a_pipeline(trained, tmp_path, capsys):
    """Catches: a stage that ignores the pipeline, a CLIP of another one, a network that does not fit."""
    args = ["train", "decoder", "--preset", "tiny", "--out", str(tmp_path), "--quiet", "--device", "cpu"]
    args += ["--init", str(trained), "--lr", "1e-30", "--set", "decoder.optimisation.weight_decay=0"]
    assert main(args) == 0
    assert f"clip: that of {trained}" in capsys.readouterr().out
    for name, where in (("clip", trained / "clip"), ("decoder", trained / "decoder")):
        before = load_weights(where / "model.safetensors")[1]
        after = load_weights(tmp_path / name / "model.safetensors")[1]
        for key, value in before.items():  # the pipeline has bfloat16
            torch.testing.assert_close(after[key], value, rtol=2**-8, atol=1e-6)
    sampled = "{fraction: 1.0, strength: [0.5, 0.5], steps: 2, guidance: [1.0]}"
    args = ["train", "upsampler", *args[2:4], "--out", str(tmp_path / "up"), "--quiet", "--device", "cpu"]
    assert main([*args, "--init", str(trained), "--set", f"upsampler.data.sampled={sampled}"]) == 0
    assert f"decoder: that of {trained}" in capsys.readouterr().out
    args = ["train", "decoder", *args[2:]]
    other = ["--init", str(trained), "--out", str(tmp_path / "other")]
    other += ["--set", "decoder.model.num_image_tokens=3"]
    assert main([*args[:4], "--quiet", *other]) == 2
    assert "does not fit this stage and preset: its decoder: num_image_tokens" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([*args[:4], "--init", str(tmp_path / "empty"), "--out", str(tmp_path / "third")]) == 2
    assert "expected a file of weights or a pipeline" in capsys.readouterr().err


def test_presets_for_own_data_ask_for_it(tmp_path, capsys):
    """Catches: a network of a billion weights on rendered circles."""
    assert main(["train", "clip", "--preset", "photos-64", "--out", str(tmp_path / "run")]) == 2
    assert "--data: expected images with captions for the preset photos-64" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["clip", "--freeze", "vision"], "no weight begins with 'vision'"),
        (["clip", "--init", "nowhere.safetensors"], "nowhere.safetensors not found"),
        (["all", "--freeze", "visual."], "expected one stage, got all"),
    ],
)
def test_init_and_freeze_errors(options, message, tmp_path, capsys):
    """Catches: a prefix that matches nothing and trains everything, a missing file met with a traceback."""
    assert main(["train", *options, "--preset", "tiny", "--out", str(tmp_path), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_an_autoregressive_prior_and_a_second_upsampler_join_the_pipeline(trained, tmp_path, capsys):
    """Catches: an option without effect, a class that export forgets, statistics that were never fitted."""
    out = tmp_path / "run"
    for stage in ("clip", "decoder", "upsampler"):
        shutil.copytree(trained / stage, out / stage)
    common = ["--preset", "tiny", "--out", str(out), "--device", "cpu", "--quiet"]
    assert main(["train", "prior", "--prior", "autoregressive", *common]) == 0
    assert main(["train", "upsampler2", *common]) == 0
    assert "cosine" in rows_of(out, "prior")[-1] and "psnr" in rows_of(out, "upsampler2")[-1]
    assert main(["train", "all", "--export", *common]) == 0
    pipeline = load_on_cpu(out)
    assert isinstance(pipeline.prior, ARPrior) and pipeline.prior.fitted
    assert pipeline.sizes == (16, 32, 64)
    assert pipeline("a red circle", num_images=2, seed=0, steps=2).shape == (2, 3, 64, 64)


def test_a_second_upsampler_is_no_part_of_all(trained):
    assert DALLE2.from_pretrained(trained).upsampler2 is None and not (trained / "upsampler2").exists()
