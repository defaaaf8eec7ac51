"""Weights of the training loss over time."""

from __future__ import annotations

import torch
from torch import Tensor


def loss_weight(
    log_snr: Tensor,  # [B]
    prediction: str,
    weighting: str,
    min_snr_gamma: float,
    max_weight: float,
) -> Tensor:  # float64 [B]
    """The weight on the squared error of what the network predicts, so that the loss is `weighting`'s.

    An error of x0 is sigma / alpha times one of epsilon and sigma times one of v. With w the weight on x0's
    error, the weight is w for a network that predicts x0, w / SNR for epsilon and w / (1 + SNR) for v. w is

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
    log_unit = {
        "sample": torch.zeros_like(log_snr),
        "epsilon": log_snr,
        "v_prediction": -noise_share.log(),
    }[prediction]
    return (log_weight - log_unit).exp().clamp(max=max_weight)
