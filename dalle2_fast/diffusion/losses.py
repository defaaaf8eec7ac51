"""Terms of the training loss and of the variational bound, per sample or per element."""

from __future__ import annotations

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "sample", "v_prediction")
WEIGHTINGS = ("uniform", "simple", "x0", "v", "min_snr")


def loss_weight(
    log_snr: Tensor,  # [B]
    prediction: str,
    weighting: str,
    min_snr_gamma: float,
    max_weight: float,
) -> Tensor:  # float64 [B]
    """The weight on the squared error of what the network predicts, so that the loss is `weighting`'s.

    An error of x0 is sigma / alpha times one of epsilon and sigma times one of v. With w the weight on x0's error,
    the weight is w for a network that predicts x0, w / SNR for epsilon and w / (1 + SNR) for v. w is

        x0: 1    simple (epsilon): SNR    v: 1 + SNR    min_snr: min(SNR, gamma)    (Hang et al., 2303.09556)

    and "uniform" means weight 1 whatever is predicted. Weights are cut at max_weight.
    """
    log_snr = log_snr.to(torch.float64)
    if weighting == "uniform":
        return torch.ones_like(log_snr)
    # Ratios in closed form: SNR itself may overflow or vanish, these do not.
    noise_share = torch.sigmoid(-log_snr)  # sigma^2 = 1 / (1 + SNR)
    log_cap = torch.full_like(log_snr, min_snr_gamma).log()
    log_weight = {
        "x0": torch.zeros_like(log_snr),
        "simple": log_snr,
        "v": -noise_share.log(),
        "min_snr": torch.minimum(log_snr, log_cap),
    }[weighting]
    log_unit = {"sample": torch.zeros_like(log_snr), "epsilon": log_snr, "v_prediction": -noise_share.log()}[prediction]
    return (log_weight - log_unit).exp().clamp(max=max_weight)


def normal_kl(mean_1: Tensor, log_var_1: Tensor, mean_2: Tensor, log_var_2: Tensor) -> Tensor:
    """KL(N(mean_1, exp(log_var_1)) || N(mean_2, exp(log_var_2))) in nats, per element."""
    difference = log_var_1 - log_var_2
    return 0.5 * (torch.expm1(difference) - difference + (mean_1 - mean_2) ** 2 * torch.exp(-log_var_2))


def normal_nll(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """-log N(x; mean, exp(log_var)) in nats, per element."""
    return 0.5 * (1.8378770664093453 + log_var + (x - mean) ** 2 * torch.exp(-log_var))  # log(2 pi)


def discretised_normal_nll(x: Tensor, mean: Tensor, log_var: Tensor, levels: int = 256) -> Tensor:
    """-log of the normal's mass in x's bin, in nats per element; x in [-1, 1] is one of `levels` values.

    Bins are 2 / (levels - 1) wide, the outer two reach to infinity (Ho et al., 2006.11239, equation 13). By way of log
    cumulative distributions: differences of plain ones are 0 in the tails, and the log of that has no gradient.
    """
    half, inverse_std = 1 / (levels - 1), torch.exp(-0.5 * log_var)
    distance = (x - mean).abs()
    upper = torch.special.log_ndtr((half - distance) * inverse_std)
    lower = torch.special.log_ndtr((-half - distance) * inverse_std)
    # The difference of the logs is cut just below 0, where the bin is too narrow for the precision.
    inner = upper + torch.log(-torch.expm1((lower - upper).clamp(max=-torch.finfo(x.dtype).eps)))
    lowest = torch.special.log_ndtr((x - mean + half) * inverse_std)
    highest = torch.special.log_ndtr((mean - x + half) * inverse_std)
    edge = 1 - half
    return -torch.where(x < -edge, lowest, torch.where(x > edge, highest, inner))
