"""Distribution matching: the student's samples get the distribution of the teacher's, and no target each.

Let x = F(x_s, s, w) be a sample of the student, x_t that sample with new noise, T(x_t, t, w) the teacher's x0
with guidance weight w, and G(x_t, t) the x0 of a third network, trained on the student's samples alone. T and
G estimate the scores of the two distributions, and the difference leads a sample from one to the other:

    gradient = (G(x_t, t) - T(x_t, t, w)) / mean |x - T(x_t, t, w)|
    loss     = 1/2 mean (x - stopgrad(x - gradient))^2

x_s is what the student meets when it samples: pure noise in its first step, in a later one its own answer
with noise. G starts as the teacher and must follow the student, so it is updated four times as often.

Source: Yin et al., "Improved Distribution Matching Distillation", 2405.14867, sections 4.2 (no regression,
two time scales), 4.4 and 4.5 (several steps from the student's own samples); "One-step Diffusion with
Distribution Matching Distillation", 2311.18828, equations 7 and 8, for the gradient and its factor. The
adversarial loss of section 4.3 is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dalle2_fast.diffusion.process import GaussianDiffusion
from dalle2_fast.diffusion.training import loss_weight
from dalle2_fast.draws import draw
from dalle2_fast.training.distillation.loss import Denoiser, bounded, per_sample

PERIOD = 5  # steps of the training: four for G, then one for the student


def is_students_turn(step: int) -> bool:
    """Whether this step trains the student, and not the network that follows it.

    Example:
        >>> [step for step in range(12) if is_students_turn(step)]
        [4, 9]
    """
    return step % PERIOD == PERIOD - 1


@torch.no_grad()
def students_input(
    diffusion: GaussianDiffusion,
    student: Denoiser,
    noise: Tensor,
    generator: torch.Generator,
    *,
    steps: int,
    place: int,
    clip: float | None = 1.0,
) -> tuple[Tensor, Tensor]:
    """What the student meets in one of its steps: x_s [B, C, *] and the times s [B].

    Args:
        diffusion: the process of the student.
        student: F.
        noise: standard normal noise [B, C, *], with which sampling begins.
        generator: of the noise of later steps.
        steps: of the sampler "consistency".
        place: number of the step, from 0.
        clip: bound on x0, as the sampler has it.

    Example:
        >>> from dalle2_fast.diffusion import make_schedule
        >>> diffusion = GaussianDiffusion(make_schedule("cosine"))
        >>> zeros = lambda x, t: torch.zeros_like(x)
        >>> noise = torch.randn(2, 3)
        >>> x, s = students_input(diffusion, zeros, noise, torch.Generator(), steps=4, place=0)
        >>> torch.equal(x, noise), s
        (True, tensor([999, 999]))
    """
    times = diffusion.times(steps, "trailing").to(noise.device)
    x, t = noise, times[0].expand(len(noise))
    for number in range(place):
        x0 = bounded(student(x, t), clip)
        t = times[number + 1].expand(len(noise))
        fresh = draw(torch.randn, noise.shape, generator, device=noise.device)
        x = diffusion.add_noise(x0, t, fresh.to(noise.dtype))
    return x, t


def matching_loss(x0: Tensor, followed: Tensor, wanted: Tensor) -> Tensor:
    """A loss [B] whose gradient for x0 is that at the top of the file, divided by the number of elements.

    Args:
        x0: samples of the student [B, C, *], with gradients.
        followed: G's x0.
        wanted: the teacher's x0.

    Example:
        >>> x0 = torch.tensor([[1.0, 1.0]], requires_grad=True)
        >>> matching_loss(x0, torch.tensor([[3.0, 1.0]]), torch.tensor([[0.0, 0.0]])).sum().backward()
        >>> x0.grad
        tensor([[1.5000, 0.5000]])
    """
    with torch.no_grad():
        distance = (x0 - wanted).abs().flatten(1).mean(1).clamp(min=1e-6)
        goal = x0 - (followed - wanted) / per_sample(distance, x0)
    return 0.5 * (x0 - goal).float().square().flatten(1).mean(1)


def following_loss(diffusion: GaussianDiffusion, x0: Tensor, followed: Tensor, t: Tensor) -> Tensor:
    """The loss [B] of G: its error of x0, weighted by 1 + SNR as an error of v is.

    Args:
        diffusion: the process; `max_weight` bounds the weight.
        x0: samples of the student [B, C, *].
        followed: G's x0 at times t, with gradients.
        t: times [B].

    Example:
        >>> from dalle2_fast.diffusion import make_schedule
        >>> diffusion = GaussianDiffusion(make_schedule("cosine"))
        >>> following_loss(diffusion, torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([5]))
        tensor([0.])
    """
    log_snr = diffusion.schedule.log_snr(t)
    weight = loss_weight(log_snr, "sample", "v", diffusion.min_snr_gamma, diffusion.max_weight)
    squared = (followed - x0).float().square().flatten(1).mean(1)
    return weight.to(squared.dtype) * squared


def distribution_loss(
    diffusion: GaussianDiffusion,
    student: Denoiser,
    teacher: Denoiser,
    follower: Denoiser,
    noise: Tensor,
    generator: torch.Generator,
    *,
    steps: int,
    students_turn: bool,
    clip: float | None = 1.0,
) -> Tensor:
    """The loss [B] of the student where it is the student's turn, else that of the network that follows it.

    Args:
        diffusion: the process of the student; that of the others has the same schedule.
        student, teacher, follower: F, T and G.
        noise: standard normal noise [B, C, *].
        generator: of everything else that is random.
        steps: of the sampler "consistency".
        students_turn: which of the two is trained; the other one gets no gradients.
        clip: bound on the x0 of all three, as the sampler has it.
    """
    place = int(torch.randint(steps, (), generator=generator, device=generator.device))
    x_s, s = students_input(diffusion, student, noise, generator, steps=steps, place=place, clip=clip)
    with torch.set_grad_enabled(students_turn):
        x0 = student(x_s, s)
    t = diffusion.sample_times(len(x0), generator, x0.device)
    fresh = draw(torch.randn, x0.shape, generator, device=x0.device)
    x_t = diffusion.add_noise(x0.detach(), t, fresh.to(x0.dtype))
    if not students_turn:
        return following_loss(diffusion, bounded(x0, clip), follower(x_t, t), t)
    with torch.no_grad():
        followed, wanted = (bounded(network(x_t, t), clip) for network in (follower, teacher))
    return matching_loss(x0, followed, wanted)
