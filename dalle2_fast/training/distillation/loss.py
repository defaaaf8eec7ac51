"""The loss of distillation: the student answers at every time with the end of its teacher's flow.

Let F(x_t, t, w) be the student's x0 and T(x_t, t, w) the teacher's x0 with guidance weight w,

    T = T_none + w (T_conditional - T_none).

One step of the teacher's deterministic sampler (DDIM) leads from x_t to an earlier time r,

    x_r = alpha_r T + sigma_r (x_t - alpha_t T) / sigma_t,

and the target of the student is its own answer there, or the teacher's x0 where r is the data itself:

    target = stopgrad F(x_r, r, w),   or T(x_t, t, w) where the step ends at the data
    loss   = sqrt(1 + SNR_t) (sqrt(mean((F(x_t, t, w) - target)^2) + c^2) - c).

The step is as long as ECT's, with an angle in place of the noise level: alpha = cos u, sigma = sin u, and a
fraction g that falls from 1 during the training,

    u_r = u_t max(0, 1 - g n),   n = 1 + 8 / (1 + exp(tan u_t)).

The two agree at small noise. At large noise ECT's steps, fractions of sigma / alpha, hardly change x_t on a
schedule that ends at pure noise, and the student would learn nothing where it is called first.

At g = 1 every step ends at the data, and the loss is that of guidance distillation: the student learns the
teacher's guided x0 with the weight as an input. Then g falls, and the student learns the end of longer and
longer paths of shorter and shorter steps. Steps from small noise always end at the data and anchor it.

Source: Meng et al., 2210.03142, section 3.1, for guidance; Song et al., "Consistency Models", 2303.01469,
algorithm 2; Geng et al., "ECT", 2406.14548, section 3, for g and n; Lu and Song, 2410.11081, section 3, for
the angle; Song and Dhariwal, 2310.14189, section 3.3, for the pseudo-Huber metric and its c. The factor
sqrt(1 + SNR) turns an error of x0 into one of v.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dalle2_fast.diffusion.process import GaussianDiffusion
from dalle2_fast.diffusion.training import loss_weight
from dalle2_fast.draws import batch_rows, draw

# x_t [B, C, *] and times t [B] -> x0 [B, C, *]; conditions and guidance weights are part of the function.
Denoiser = Callable[[Tensor, Tensor], Tensor]

HUBER = 0.00054  # c; the paper's is 0.00054 sqrt(d) for a norm over d numbers
HALVINGS = 6  # of g. The flow is then about as finely divided as by the 50 steps that LCM (2310.04378) takes.
FIRST_PHASE = 0.25  # of the training of a student with guidance: g stays 1


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Values [B] as [B, 1, ...] for `like` [B, ...].

    Example:
        >>> per_sample(torch.zeros(2), torch.zeros(2, 3, 4)).shape
        torch.Size([2, 1, 1])
    """
    return values.reshape(-1, *[1] * (like.ndim - 1))


def bounded(x: Tensor, clip: float | None) -> Tensor:
    """x in [-clip, clip]; None is no bound.

    Example:
        >>> bounded(torch.tensor([-2.0, 0.5]), 1.0)
        tensor([-1.0000,  0.5000])
    """
    return x if clip is None else x.clamp(-clip, clip)


def gap(progress: float, first_phase: float) -> float:
    """The fraction g of the noise that a step removes.

    Args:
        progress: the fraction of the training that is done, in [0, 1].
        first_phase: the fraction during which g is 1, in [0, 1).

    Example:
        >>> [gap(progress, 0.25) for progress in (0.0, 0.25, 0.625, 1.0)]
        [1.0, 1.0, 0.125, 0.015625]
    """
    return 2.0 ** (-HALVINGS * max(0.0, progress - first_phase) / (1 - first_phase))


def earlier_times(diffusion: GaussianDiffusion, t: Tensor, g: float) -> tuple[Tensor, Tensor]:
    """Where the steps from times t end.

    Args:
        diffusion: the process.
        t: times [B].
        g: see `gap`.

    Returns:
        Times r [B], earlier than t, and whether a step ends at the data instead, bool [B]. A discrete r is
        the nearest one, at least one before t.

    Example:
        >>> from dalle2_fast.diffusion import make_schedule
        >>> diffusion = GaussianDiffusion(make_schedule("cosine"))
        >>> earlier_times(diffusion, torch.tensor([999, 700, 0]), 0.25)[1]
        tensor([False, False,  True])
    """
    schedule = diffusion.schedule
    log_snr = schedule.log_snr(t)
    s = torch.exp(-log_snr / 2)
    angle = torch.atan(s) * (1 - g * (1 + 8 * torch.sigmoid(-s))).clamp(min=0)
    log_snr_r = -2 * torch.tan(angle).log()
    first = torch.zeros_like(t)
    at_data = log_snr_r >= schedule.log_snr(first)
    r = schedule.time_at(torch.where(at_data, log_snr, log_snr_r))
    if schedule.timesteps is not None:
        at_data = at_data | (t == 0)
        r = torch.minimum(r, t - 1).clamp(min=0)
    return r, at_data


def deterministic_step(
    diffusion: GaussianDiffusion, x_t: Tensor, x0: Tensor, t: Tensor, r: Tensor
) -> Tensor:
    """x at times r [B] of the flow from x_t [B, C, *] at times t [B], with the x0 at t.

    Source: Song et al., 2010.02502, equation 13.

    Example:
        >>> from dalle2_fast.diffusion import make_schedule
        >>> diffusion = GaussianDiffusion(make_schedule("cosine"))
        >>> t = torch.tensor([500])
        >>> deterministic_step(diffusion, torch.ones(1, 2), torch.zeros(1, 2), t, t)
        tensor([[1., 1.]])
    """
    schedule = diffusion.schedule
    a = schedule.sigma(r) / schedule.sigma(t)
    b = schedule.alpha(r) - a * schedule.alpha(t)
    a, b = (per_sample(value.to(x_t.dtype), x_t) for value in (a, b))
    return a * x_t + b * x0


def distillation_loss(
    diffusion: GaussianDiffusion,
    student: Denoiser,
    teacher: Denoiser,
    x0: Tensor,
    *,
    t: Tensor,
    noise: Tensor,
    g: float,
    clip: float | None = 1.0,
) -> Tensor:
    """The loss of each sample, see the top of the file.

    Args:
        diffusion: the process of the student; that of the teacher has the same schedule.
        student: F, with gradients; it is called at x_t, and without gradients at x_r.
        teacher: T, called without gradients.
        x0: clean data [B, C, *].
        t: times [B].
        noise: standard normal noise [B, C, *].
        g: the length of the steps, see `gap`.
        clip: bound on the x0 of teacher and target, as the sampler has it; None for no bound.

    Returns:
        float [B].

    Example:
        >>> from dalle2_fast.diffusion import make_schedule
        >>> diffusion = GaussianDiffusion(make_schedule("cosine"), prediction="sample")
        >>> zeros, t = torch.zeros(2, 3), torch.tensor([10, 900])
        >>> same = lambda x, t: torch.zeros_like(x)
        >>> distillation_loss(diffusion, same, same, zeros, t=t, noise=zeros, g=0.5)
        tensor([0., 0.])
    """
    x_t = diffusion.add_noise(x0, t, noise)
    with torch.no_grad():
        target = bounded(teacher(x_t, t), clip)
        if g < 1:
            r, at_data = earlier_times(diffusion, t, g)
            x_r = deterministic_step(diffusion, x_t, target, t, r)
            target = torch.where(per_sample(at_data, x_t), target, bounded(student(x_r, r), clip))
    squared = (student(x_t, t) - target).float().square().flatten(1).mean(1)
    log_snr = diffusion.schedule.log_snr(t)
    weight = loss_weight(log_snr, "sample", "v", diffusion.min_snr_gamma, diffusion.max_weight**2).sqrt()
    return weight.to(squared.dtype) * ((squared + HUBER**2).sqrt() - HUBER)


def training_times(
    diffusion: GaussianDiffusion, batch: int, steps: int, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Times [batch]: a quarter of them are those of the sampler "consistency" with `steps` steps, the others
    as the process draws them.

    Example:
        >>> from dalle2_fast.diffusion import make_schedule
        >>> diffusion = GaussianDiffusion(make_schedule("cosine"))
        >>> training_times(diffusion, 4, 2, torch.Generator(), torch.device("cpu"))[0].item() in (999, 499)
        True
    """
    times = diffusion.sample_times(batch, generator, device)
    places = draw(partial(torch.randint, steps), (batch,), generator, device=generator.device).to(device)
    sampled = diffusion.times(steps, "trailing").to(device)[places]
    first, _ = batch_rows(batch, generator)
    return torch.where(torch.arange(first, first + batch, device=device) % 4 == 0, sampled, times)
