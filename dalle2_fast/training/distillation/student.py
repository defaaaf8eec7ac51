"""From a teacher to the student that is trained, and from a trained student to a pipeline."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import nn

from dalle2_fast.checkpoints import construct, open_checkpoint
from dalle2_fast.data import Tokenizer, tokenizer_from_config
from dalle2_fast.models.distilled import known_steps
from dalle2_fast.pipeline.dalle2 import DALLE2
from dalle2_fast.pipeline.settings import SamplingSettings
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.folder import reason
from dalle2_fast.training.run_folder.lock import run_lock
from dalle2_fast.training.stages.finished import load_finished

STEPS = (1, 2, 4)
GUIDED = ("prior", "decoder")
SETTINGS = {"decoder": "", "prior": "prior_", "upsampler": "upsampler_"}  # what its settings begin with


def load_teacher(path: Path, device: torch.device | str = "cpu") -> DALLE2:
    """The pipeline of a teacher, in float32 and without gradients."""
    pipe = DALLE2.from_pretrained(path, device=torch.device(device), dtype=torch.float32)
    return pipe.requires_grad_(False)


def teacher_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a teacher, without its weights."""
    checkpoint = open_checkpoint(path)
    return construct(tokenizer_from_config, checkpoint.config, "tokenizer", checkpoint.path)


def check_teacher(pipe: DALLE2, stage: str) -> nn.Module:
    """The network of a stage that is to be distilled.

    Raises:
        ValueError: there is none, it is no diffusion, or it was distilled itself.
    """
    network = getattr(pipe, stage)
    if network is None:
        parts = [name for name in SETTINGS if getattr(pipe, name) is not None]
        raise ValueError(f"--teacher: expected a pipeline with {stage}, got one with {', '.join(parts)}")
    if not hasattr(network, "diffusion"):
        raise ValueError(f"--teacher: expected a diffusion {stage}, got {type(network).__name__}")
    if network.consistency_steps is not None or getattr(network, "guidance_input", None) is not None:
        known = ", ".join(map(str, known_steps(network.consistency_steps or 1)))
        raise ValueError(
            f"--teacher: expected a {stage} of many steps, got one that was distilled itself (steps {known})"
        )
    return network


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of the weights of a network, so that a run is not resumed with another teacher."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def make_student(teacher: nn.Module, steps: int, guidance: tuple[float, float] | None) -> nn.Module:
    """A copy of a teacher with guidance as an input, for `steps` steps of the sampler "consistency".

    A network that predicts epsilon becomes one that predicts v, with the same weights, and learns the
    difference: its x0 = (x_t - sigma epsilon) / alpha is not defined at pure noise, where a student begins.
    Where there is little noise, epsilon and v are the same.

    Args:
        teacher: a Decoder, DiffusionPrior or Upsampler.
        steps: the largest number of steps.
        guidance: smallest and largest guidance weight; None for an upsampler.

    Source: Salimans and Ho, 2202.00512, section 4, for the prediction.

    Example:
        >>> from dalle2_fast import DiffusionPrior
        >>> net = dict(dim=16, depth=1, heads=2, dim_head=8, text_dim=5, context_length=3)
        >>> student = make_student(DiffusionPrior(net, image_embed_dim=6), 2, (1.0, 4.0))
        >>> student.config["guidance_input"], student.config["consistency_steps"]
        ([1.0, 4.0], 2)
    """
    changes: dict = {"consistency_steps": steps, "sample_timesteps": steps}
    if guidance is not None:
        changes["guidance_input"] = list(guidance)
    if teacher.config["prediction"] == "epsilon":
        changes["prediction"] = "v_prediction"
    # No step of the student needs the measured variance, or the network for the last step of many.
    changes |= {name: value for name, value in (("analytic_variance", False), ("last_unet", None))
                if name in teacher.config}  # fmt: skip
    student = type(teacher)(**teacher.config | changes)
    weights = student.state_dict()
    weights |= {name: value for name, value in teacher.state_dict().items() if name in weights}
    student.load_state_dict(weights)
    return student


def student_settings(teacher: dict, stage: str, steps: int, guidance: tuple[float, float] | None) -> dict:
    """The sampling settings of a pipeline whose `stage` was distilled, from those of its teacher.

    Example:
        >>> settings = student_settings(SamplingSettings().to_dict(), "decoder", 2, (1.0, 5.0))
        >>> settings["sampler"], settings["steps"], settings["prior_sampler"]
        ('consistency', 2, 'dpm++')
    """
    settings, prefix = dict(teacher), SETTINGS[stage]
    before = SamplingSettings.from_dict(teacher)
    if stage == "decoder":  # its sampler is that of the other stages, too, unless they have one
        others = ("prior", "upsampler", "upsampler2")
        settings |= {f"{other}_sampler": before.sampler_of(other) for other in others}
    settings |= {f"{prefix}sampler": "consistency", f"{prefix}steps": steps}
    if guidance is not None:
        low, high = guidance
        weight = min(max(settings[f"{prefix}guidance"], low), high)
        settings |= {f"{prefix}guidance": weight, f"{prefix}guidance_interval": None}
    return settings


def export_student(stage: str, teacher: Path, out: Path, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write the pipeline of the teacher with the finished student in its place.

    Args:
        stage: that was distilled.
        teacher: folder of the teacher.
        out: folder of the run, which gets config.json and model.safetensors.
        dtype: of the stored weights.

    Returns:
        The folder.

    Raises:
        TrainingError: the student is not finished, or the folder cannot be written.
    """
    with run_lock(out):
        pipe = load_teacher(teacher)
        network = check_teacher(pipe, stage)
        student = load_finished(out, stage, (type(network),))
        setattr(pipe, stage, student)
        steps, guidance = student.consistency_steps, student.config.get("guidance_input")
        pipe.sampling = student_settings(pipe.sampling, stage, steps, guidance)
        if all(getattr(getattr(pipe, name), "guidance_input", None) is not None for name in GUIDED):
            pipe.sampling["negative_prompt"] = None  # no network is left that could be given one
        distilled = {**pipe.metadata.get("distilled", {}), stage: {"steps": steps, "guidance": guidance}}
        pipe.metadata |= {"distilled": distilled}
        try:
            return pipe.save_pretrained(out, dtype=dtype)
        except OSError as error:
            raise TrainingError(f"--out: cannot write to {out}: {reason(error)}") from error


def check_folders(teacher: Path, out: Path) -> None:
    """ValueError if a run would overwrite its teacher."""
    if os.path.abspath(teacher) == os.path.abspath(out):
        raise ValueError(f"--out: expected another folder than that of the teacher, got {out}")
