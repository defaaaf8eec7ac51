"""The losses of CLIP and SigLIP as modules, on one process or many."""

from dalle2_fast.losses.clip_loss import ClipLoss
from dalle2_fast.losses.siglip_loss import SigLipLoss
from dalle2_fast.losses.soft_clip_loss import SoftClipLoss

__all__ = ["ClipLoss", "SigLipLoss", "SoftClipLoss"]
