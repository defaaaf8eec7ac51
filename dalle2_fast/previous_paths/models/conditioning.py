from dalle2_fast.models.decoder.conditioning import ConditionProjection

__all__ = ["ConditionProjection"]
