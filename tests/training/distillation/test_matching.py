"""Distribution matching, on data with known scores, and the command. Each test names the fault it catches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dalle2_fast.diffusion import GaussianDiffusion, make_schedule
from dalle2_fast.training.distillation.matching import (
    distribution_loss,
    is_students_turn,
    matching_loss,
    students_input,
)
from dalle2_fast.training.weights import load_weights
from tests.support.gaussian_data import DEVIATION, MEAN, exact_net
from tests.support.tiny_pipeline import load_on_cpu
from tests.training.distillation.test_distill import distill
from tests.training.distillation.test_distillation_loss import Linear


def process() -> GaussianDiffusion:
    return GaussianDiffusion(make_schedule("continuous_cosine"), "v_prediction")


def as_denoiser(diffusion: GaussianDiffusion, net):
    return lambda x, t: diffusion.predict_x0(x, t, net(x, diffusion.schedule.net_time(t)))


def test_the_students_samples_get_the_teachers_distribution():
    """Catches: a gradient of the other sign, a network that follows the teacher in place of the student, a
    student that collapses to the mean.

    One step: the samples of two steps are a mixture, which this follower, linear in x, cannot represent."""
    diffusion, student, follower = process(), Linear(), Linear()
    teacher = as_denoiser(diffusion, exact_net(diffusion.schedule, "v_prediction"))
    generator, optimizers = torch.Generator().manual_seed(1), {}
    for turn, net in ((True, student), (False, follower)):
        optimizers[turn] = torch.optim.Adam(net.parameters(), 1e-2, betas=(0.0, 0.99))
    iterations = 400
    for step in range(iterations):
        turn = is_students_turn(step)
        optimizers[turn].param_groups[0]["lr"] = (2e-2 if turn else 4e-2) * (1 - step / iterations)
        loss = distribution_loss(
            diffusion, as_denoiser(diffusion, student), teacher, as_denoiser(diffusion, follower),
            torch.randn(256, 4, generator=generator), generator, steps=1, students_turn=turn, clip=None,
        ).mean()  # fmt: skip
        optimizers[turn].zero_grad()
        loss.backward()
        optimizers[turn].step()
    options = dict(seeds=torch.arange(200), steps=1, sampler="consistency", clip=None)
    drawn = diffusion.sample(student, (200, 50), **options)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.08)
    assert drawn.std().item() == pytest.approx(DEVIATION, rel=0.15)


def test_a_student_that_is_right_has_no_gradient():
    """Catches: a gradient that is left where both scores agree, which would move a finished student."""
    x0 = torch.randn(3, 4, requires_grad=True)
    same = torch.randn(3, 4)
    matching_loss(x0, same, same).sum().backward()
    assert x0.grad.abs().max() == 0


@pytest.mark.parametrize("turn", [True, False])
def test_only_one_network_is_trained_in_a_step(turn):
    """Catches: a follower that is moved by the student's loss, or a student that makes the follower's task
    easier; both let the two agree on nonsense."""
    diffusion = process()
    nets = {True: nn.Linear(4, 4), False: nn.Linear(4, 4)}
    teacher = lambda x, t: torch.zeros_like(x)  # noqa: E731
    student, follower = (lambda x, t, net=nets[each]: net(x) for each in (True, False))
    generator = torch.Generator().manual_seed(0)
    distribution_loss(
        diffusion, student, teacher, follower, torch.randn(8, 4), generator, steps=4, students_turn=turn
    ).mean().backward()
    assert nets[turn].weight.grad.abs().sum() > 0 and nets[not turn].weight.grad is None


def test_later_steps_begin_at_the_students_own_answers():
    """Catches: inputs from the data, which no student meets when it samples; a time of another step."""
    diffusion, seen = process(), []

    def student(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t[0].item())
        return torch.full_like(x, 5.0)

    generator = torch.Generator().manual_seed(0)
    x, t = students_input(diffusion, student, torch.randn(64, 64), generator, steps=4, place=3)
    times = diffusion.times(4, "trailing")
    assert seen == times[:3].tolist() and t.tolist() == [times[3].item()] * 64
    alpha, sigma = diffusion.schedule.alpha(t[:1]).item(), diffusion.schedule.sigma(t[:1]).item()
    assert x.mean().item() == pytest.approx(alpha, abs=0.03), "the answer is clipped to 1"
    assert x.std().item() == pytest.approx(sigma, abs=0.03)


@pytest.mark.parametrize("stage, steps", [("decoder", 4), ("prior", 2), ("upsampler", 1)])
def test_the_command_matches_distributions(trained, tmp_path, stage, steps):
    """Catches: a method that the command takes and ignores; a published student with the weights of the
    network that followed it; a student or a follower that is not trained."""
    out = tmp_path / "student"
    assert distill(stage, trained, out, "--method", "dmd2", "--lr", "0.01", steps=steps) == 0
    weights = load_weights(out / stage / "model.safetensors")[1]
    assert not [name for name in weights if "follower" in name]
    state = torch.load(out / stage / "state.pt", weights_only=True)["model"]
    teacher = getattr(load_on_cpu(trained), stage).state_dict()
    moved = {"": [], "follower.": []}
    for prefix, found in moved.items():
        found += [name for name, value in teacher.items() if not torch.equal(state[prefix + name], value)]
    assert moved[""] and moved["follower."]
    pipe = load_on_cpu(out)
    few = {"steps": 2, "prior_steps": 2, "upsampler_steps": 2}
    few.pop({"decoder": "steps"}.get(stage, f"{stage}_steps"))
    assert pipe("a red circle", 2, seed=0, **few).isfinite().all()


def test_a_run_keeps_its_method(trained, tmp_path, capsys):
    """Catches: a run that is continued with another loss, on a state with weights that this loss has not."""
    out = tmp_path / "student"
    assert distill("decoder", trained, out, "--method", "dmd2") == 0
    assert distill("decoder", trained, out, "--resume") == 2
    assert "cannot resume with other settings" in capsys.readouterr().err
    assert distill("decoder", trained, out, "--resume", "--method", "dmd2") == 0
