"""Noise schedules, the Gaussian diffusion process with its losses, and samplers as coefficient tables.

Each name is imported on first use.
"""

from typing import TYPE_CHECKING

from dalle2_fast._lazy import attach

if TYPE_CHECKING:  # for editors and type checkers, which cannot follow `attach`
    from dalle2_fast.diffusion.names import SAMPLERS as SAMPLERS
    from dalle2_fast.diffusion.process import GaussianDiffusion as GaussianDiffusion
    from dalle2_fast.diffusion.sampler_tables import inversion_table as inversion_table
    from dalle2_fast.diffusion.sampler_tables import sampler_table as sampler_table
    from dalle2_fast.diffusion.sampler_tables import step_times as step_times
    from dalle2_fast.diffusion.schedules import ContinuousSchedule as ContinuousSchedule
    from dalle2_fast.diffusion.schedules import DiscreteSchedule as DiscreteSchedule
    from dalle2_fast.diffusion.schedules import Schedule as Schedule
    from dalle2_fast.diffusion.schedules import make_schedule as make_schedule

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "dalle2_fast.diffusion.names": ["SAMPLERS"],
        "dalle2_fast.diffusion.process": ["GaussianDiffusion"],
        "dalle2_fast.diffusion.sampler_tables": ["inversion_table", "sampler_table", "step_times"],
        "dalle2_fast.diffusion.schedules": [
            "ContinuousSchedule", "DiscreteSchedule", "Schedule", "make_schedule",
        ],
    },
)  # fmt: skip
