"""Noise schedules, the Gaussian diffusion process with its losses, and samplers as coefficient tables."""

from dalle2_fast.diffusion.process import GaussianDiffusion
from dalle2_fast.diffusion.sampler_tables import SAMPLERS, inversion_table, sampler_table, step_times
from dalle2_fast.diffusion.schedules import ContinuousSchedule, DiscreteSchedule, Schedule, make_schedule

__all__ = [
    "SAMPLERS",
    "ContinuousSchedule",
    "DiscreteSchedule",
    "GaussianDiffusion",
    "Schedule",
    "inversion_table",
    "make_schedule",
    "sampler_table",
    "step_times",
]
