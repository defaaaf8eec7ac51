"""The names that the options of a diffusion process may have.

This file does not import torch, so that the command line can list the names without waiting for it.
"""

PREDICTIONS = ("epsilon", "sample", "v_prediction")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
WEIGHTINGS = ("uniform", "simple", "x0", "v", "min_snr")
SAMPLERS = ("ddpm", "ddim", "dpm++")
SPACINGS = ("time", "log_snr")
