"""Weights of the training loss over time."""

from __future__ import annotations

import torch
from torch import Tensor

from dalle2_fast.diffusion.preconditioning import precondition


def loss_weight(
    log_snr: Tensor,  # [B]
    prediction: str,
    weighting: str,
    min_snr_gamma: float,
    max_weight: float,
    sigma_data: float = 0.5,
) -> Tensor:  # float64 [B]
    """The weight on the network's squared error that makes the loss that of `weighting`.

    An error of x0 equals sigma / alpha times an error of epsilon, sigma times an error of v, and with "edm"
    gain times the network's error. If w is the weight on the error of x0, the weight is therefore w for a
    network that predicts x0, w / SNR for epsilon, w / (1 + SNR) for v and w gain^2 for "edm". The weightings
    are

        x0: w = 1    simple (epsilon): w = SNR    v: w = 1 + SNR    min_snr: w = min(SNR, gamma)

    and "uniform" is weight 1 on the error of what the network predicts.

    Args:
        log_snr: log(alpha^2 / sigma^2) at the times of the batch.
        prediction: one of `names.PREDICTIONS`.
        weighting: one of `names.WEIGHTINGS`.
        min_snr_gamma: gamma of "min_snr", > 0.
        max_weight: upper bound on the returned weights, > 0.
        sigma_data: of the prediction "edm", see `precondition`.

    Returns:
        The weights, float64 [B].

    Source: Hang et al., 2303.09556, for min_snr.

    Example:
        >>> loss_weight(torch.zeros(2), "epsilon", "min_snr", min_snr_gamma=5.0, max_weight=100.0)
        tensor([1., 1.], dtype=torch.float64)
    """
    log_snr = log_snr.to(torch.float64)
    if weighting == "uniform":
        return torch.ones_like(log_snr)
    # Ratios in closed form: SNR itself can overflow or vanish, these ratios cannot.
    noise_share = torch.sigmoid(-log_snr)  # sigma^2 = 1 / (1 + SNR)
    log_cap = torch.full_like(log_snr, min_snr_gamma).log()
    log_weight = {
        "x0": torch.zeros_like(log_snr),
        "simple": log_snr,
        "v": -noise_share.log(),
        "min_snr": torch.minimum(log_snr, log_cap),
    }[weighting]
    log_unit = {
        "sample": torch.zeros_like(log_snr),
        "epsilon": log_snr,
        "v_prediction": -noise_share.log(),
        "edm": -2 * precondition(log_snr, sigma_data).gain.log(),
    }[prediction]
    return (log_weight - log_unit).exp().clamp(max=max_weight)
