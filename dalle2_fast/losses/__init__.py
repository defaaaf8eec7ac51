"""The losses of CLIP and SigLIP as modules, on one process or many."""

from dalle2_fast.losses.clip_loss import ClipLoss, SigLipLoss, SoftClipLoss

__all__ = ["ClipLoss", "SigLipLoss", "SoftClipLoss"]
