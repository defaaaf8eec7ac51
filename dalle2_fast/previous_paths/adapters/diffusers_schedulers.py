from dalle2_fast.adapters.diffusers.fused_steps import StepTables as _Tables

__all__ = ["_Tables"]
