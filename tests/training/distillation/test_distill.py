"""The command `distill` on a tiny teacher, end to end. Each test names the fault it would catch."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from dalle2_fast import ARPrior, Decoder, DiffusionPrior, Upsampler
from dalle2_fast.cli import main
from dalle2_fast.training.distillation import recipe, stages
from dalle2_fast.training.weights import load_weights
from tests.support.tiny_pipeline import load_on_cpu

BRIEF = ["--iterations", "6", "--batch-size", "4", "--device", "cpu", "--quiet", "--export-dtype", "float32"]
UNET = dict(in_channels=3, patch_size=2, channels=(16, 16), layers_per_block=1, num_groups=4)
PREFIX = {"decoder": "", "prior": "prior_", "upsampler": "upsampler_"}


def distill(stage, teacher, out, *options, steps=2) -> int:
    arguments = ["distill", stage, "--teacher", str(teacher), "--steps", str(steps), "--out", str(out)]
    return main([*arguments, *BRIEF, *options])


def variant(teacher, path, **parts):
    """A copy of a teacher with other parts or settings."""
    pipe = load_on_cpu(teacher)
    for name, part in parts.items():
        setattr(pipe, name, part)
    return pipe.save_pretrained(path)


@pytest.mark.parametrize("stage, steps", [("decoder", 2), ("prior", 4), ("upsampler", 1)])
def test_the_student_takes_the_place_of_its_teacher(trained, tmp_path, stage, steps):
    """Catches: a pipeline that samples a student as its teacher, or another stage as the student; a student
    that was not trained; other networks that change."""
    assert distill(stage, trained, tmp_path / "student", steps=steps) == 0
    teacher, pipe = load_on_cpu(trained), load_on_cpu(tmp_path / "student")
    student, prefix = getattr(pipe, stage), PREFIX[stage]
    assert student.consistency_steps == steps
    assert pipe.sampling[f"{prefix}sampler"] == "consistency" and pipe.sampling[f"{prefix}steps"] == steps
    assert pipe.metadata["distilled"][stage]["steps"] == steps
    options = {} if stage == "prior" else {"prior_steps": 2}
    options |= {} if stage == "upsampler" else {"upsampler_steps": 2}
    options |= {} if stage == "decoder" else {"steps": 2}
    images = pipe("a red circle", 2, seed=0, **options)
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all()
    for name in ("clip", "prior", "decoder", "upsampler"):
        before, after = (getattr(each, name).state_dict() for each in (teacher, pipe))
        same = all(torch.equal(value, after[key]) for key, value in before.items() if key in after)
        assert same == (name != stage), name
    if stage == "decoder":
        with pytest.raises(ValueError, match="steps: expected 1 or 2, for which this decoder was distilled"):
            pipe("a red circle", 1, steps=12, **options)
        assert pipe.variations(images[:1], 1, seed=0, upsampler_steps=2).images.isfinite().all()
        # The student is itself the teacher of another stage; what it knows stays.
        assert distill("prior", tmp_path / "student", tmp_path / "both", steps=1) == 0
        both = load_on_cpu(tmp_path / "both")
        assert both("a red circle", 1, seed=0, upsampler_steps=2).isfinite().all()
        assert sorted(both.metadata["distilled"]) == ["decoder", "prior"]


def test_a_killed_distillation_resumes_bit_for_bit(trained, tmp_path, monkeypatch):
    """Catches: a phase, a time, a weight or a dropped condition that is no function of (seed, step)."""
    monkeypatch.setattr(recipe, "OPTIMISATION", replace(recipe.OPTIMISATION, save_steps=2, log_steps=2))
    assert distill("decoder", trained, tmp_path / "whole") == 0
    batch = stages.DistilledStage.batch

    def killed(self, step):
        if step == 5:
            raise KeyboardInterrupt  # nothing is saved on the way out; the state is that of step 4
        return batch(self, step)

    monkeypatch.setattr(stages.DistilledStage, "batch", killed)
    assert distill("decoder", trained, tmp_path / "again") == 130
    assert not (tmp_path / "again" / "config.json").exists()
    monkeypatch.setattr(stages.DistilledStage, "batch", batch)
    assert distill("decoder", trained, tmp_path / "again", "--resume") == 0
    whole, again = (load_weights(tmp_path / name / "decoder" / "model.safetensors")[1]
                    for name in ("whole", "again"))  # fmt: skip
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    log = (tmp_path / "again" / "decoder" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [2, 4, 6]
    # Finished: the command does nothing but write the pipeline again.
    before = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert distill("decoder", trained, tmp_path / "again", "--resume") == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == before


def karlo_like(pipe) -> dict:
    """Networks as Karlo has them: epsilon with a learned range, CLIP's raw projections and encodings, a
    second U-Net for the last step."""
    wide, text = pipe.clip.dim_latent, pipe.clip.config["dim_text"]
    decoder = Decoder(
        dict(attention_levels=(1,), head_dim=8, cross_dim=16, out_channels=6, **UNET), image_size=16,
        image_embed_dim=wide, text_embed_dim=wide, text_encoding_dim=text, unit_norm=False, embed_scale=1.0,
        num_image_tokens=2,
    )  # fmt: skip
    net = dict(dim=16, depth=1, heads=2, dim_head=8, text_dim=text, context_length=pipe.clip.context_length)
    prior = DiffusionPrior(
        net, image_embed_dim=wide, unit_norm=False, embed_scale=1.0, analytic_variance=True
    )
    level = dict(attention_levels=(), out_channels=3) | UNET | dict(in_channels=6)
    upsampler = Upsampler(level, last_unet=level, image_size=32, low_res_size=16)
    sampling = pipe.sampling | dict(negative_prompt="a red circle", guidance=4.0, sampler="ddim")
    return dict(decoder=decoder, prior=prior, upsampler=upsampler, sampling=sampling)


def dalle2_pytorch_like(pipe) -> dict:
    """A decoder as DALLE2-pytorch trains one: epsilon of a fixed variance, conditions dropped by half."""
    wide, text = pipe.clip.dim_latent, pipe.clip.config["dim_text"]
    decoder = Decoder(
        dict(attention_levels=(1,), head_dim=8, cross_dim=16, out_channels=3, **UNET), image_size=16,
        image_embed_dim=wide, text_embed_dim=wide, text_encoding_dim=text, variance="fixed_small",
        image_cond_drop_prob=0.1, text_cond_drop_prob=0.5, weighting="min_snr",
    )  # fmt: skip
    return dict(decoder=decoder)


def masked(pipe) -> dict:
    """A decoder that also receives what it must keep, with preconditioning and an interval of guidance."""
    config = pipe.decoder.config | dict(prediction="edm")
    sampling = pipe.sampling | dict(guidance_interval=[-4.0, 2.0])
    return dict(decoder=Decoder.for_inpainting(Decoder(**config)), sampling=sampling)


@pytest.mark.parametrize(
    "stage, kind",
    [("decoder", karlo_like), ("prior", karlo_like), ("upsampler", karlo_like),
     ("decoder", dalle2_pytorch_like), ("decoder", masked)],
)  # fmt: skip
def test_teachers_of_other_projects(trained, tmp_path, stage, kind):
    """Catches: a prediction, a learned variance, a second U-Net, encodings or a negative caption that only a
    teacher of this project's recipes does without."""
    torch.manual_seed(0)
    teacher = variant(trained, tmp_path / "teacher", **kind(load_on_cpu(trained)))
    assert distill(stage, teacher, tmp_path / "student") == 0
    pipe = load_on_cpu(tmp_path / "student")
    config = getattr(pipe, stage).config
    if kind is karlo_like and stage != "prior":
        assert config["prediction"] == "v_prediction" and config.get("last_unet") is None
    assert pipe.sampling["guidance_interval"] is None or stage != "decoder"
    few = {"steps": 2, "prior_steps": 2, "upsampler_steps": 2}
    few = {name: value for name, value in few.items() if name != f"{PREFIX[stage]}steps"}
    assert pipe("a red circle", 2, seed=0, **few).isfinite().all()


def test_bad_input_is_one_line_and_exit_code_2(trained, tmp_path, capsys):
    """Catches: a traceback; a wrong teacher that is found after an hour; a teacher that is overwritten."""
    pipe = load_on_cpu(trained)
    net = dict(dim=16, depth=1, heads=2, num_components=6, num_buckets=8, num_dot_buckets=4)
    text = dict(text_dim=pipe.clip.config["dim_text"], context_length=pipe.clip.context_length)
    other = variant(
        trained, tmp_path / "other", upsampler=None, metadata={},
        prior=ARPrior(net=net | text | dict(embed_dim=pipe.clip.dim_latent)),
    )  # fmt: skip
    strange = variant(trained, tmp_path / "strange", metadata={"world": {"shapes": ["heart"]}})
    out = tmp_path / "out"
    for stage, teacher, target, options, message in (
        ("decoder", tmp_path / "none", out, [], "none"),
        ("upsampler", other, out, [], "--teacher: expected a pipeline with upsampler, got one with decoder"),
        ("prior", other, out, [], "--teacher: expected a diffusion prior, got ARPrior"),
        ("decoder", other, out, [], "--data: expected shards, because the teacher was not trained on"),
        ("decoder", strange, out, [], "has another tokenizer than the scenes of its world"),
        ("decoder", trained, trained, [], "--out: expected another folder than that of the teacher"),
        ("upsampler", trained, out, ["--guidance", "1", "3"], "--guidance: expected none"),
        ("decoder", trained, out, ["--guidance", "3", "1"], "--guidance: expected finite numbers 0 <= low"),
        ("decoder", trained, out, ["--iterations", "0"], "steps: expected a number above 0, got 0"),
    ):
        assert distill(stage, teacher, target, *options) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    assert not out.exists()
    with pytest.raises(SystemExit) as error:
        distill("decoder", trained, out, steps=3)
    assert error.value.code == 2 and "--steps: expected one of 1, 2, 4, got 3" in capsys.readouterr().err


def test_a_run_is_resumed_with_its_own_settings(trained, tmp_path, capsys):
    """Catches: a student that is trained further by another teacher, for other steps or weights."""
    out = tmp_path / "student"
    assert distill("decoder", trained, out) == 0
    assert distill("decoder", trained, out) == 2
    assert "already holds a training state: add --resume" in capsys.readouterr().err
    for options in (dict(steps=4), dict(guidance=("--guidance", "1", "9"))):
        extra = options.pop("guidance", ())
        assert distill("decoder", trained, out, "--resume", *extra, **options) == 2
        assert "cannot resume with other settings" in capsys.readouterr().err
    assert distill("decoder", out, tmp_path / "twice") == 2
    error = capsys.readouterr().err
    assert "--teacher: expected a decoder of many steps, got one that was distilled" in error
