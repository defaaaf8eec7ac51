"""A decoder that also receives what it must keep: C + 1 more input channels, for the kept image and the mask.

Source: Nichol et al., "GLIDE", 2112.10741, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dalle2_fast.checkpoints.weights import unfilled
from dalle2_fast.diffusion.inpainting import check_mask
from dalle2_fast.models.unet.model import UNet

if TYPE_CHECKING:
    from dalle2_fast.models.decoder.model import Decoder


def check_inpainting_mask(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the mask as bool [1 or B, 1, H, W] for images of `shape`.

    Raises:
        TypeError, ValueError: it is not such a mask.

    Example:
        >>> check_inpainting_mask(torch.ones(1, 1, 1, 1), (2, 3, 4, 4)).shape
        torch.Size([1, 1, 4, 4])
    """
    mask = check_mask(mask, tuple(shape))
    if mask.shape[1] != 1:
        raise ValueError(f"mask: expected [1 or B, 1, H, W], got {tuple(mask.shape)}")
    return mask.expand(-1, -1, *shape[2:])


def kept_channels(known: Tensor, mask: Tensor) -> Tensor:
    """The channels that an inpainting U-Net receives in addition to x.

    Args:
        known: images [B, C, H, W] in [-1, 1].
        mask: bool [1 or B, 1, H, W], True = repaint.

    Returns:
        [B, C + 1, H, W]: the image where it is kept, 0 elsewhere, and the mask.

    Example:
        >>> kept_channels(torch.ones(2, 3, 4, 4), torch.ones(1, 1, 4, 4, dtype=torch.bool)).shape
        torch.Size([2, 4, 4, 4])
    """
    mask = mask.to(known.device).expand(len(known), -1, -1, -1)
    return torch.cat([known.masked_fill(mask, 0.0), mask.to(known.dtype)], dim=1)


def nothing_kept(shape: Sequence[int], like: Tensor) -> Tensor:
    """The same channels for images of `shape` (B, C, H, W) of which nothing is kept.

    Example:
        >>> nothing_kept((2, 3, 4, 4), torch.zeros(0)).shape
        torch.Size([2, 4, 4, 4])
    """
    batch, channels, height, width = shape
    extra = like.new_zeros(batch, channels + 1, height, width)
    extra[:, -1] = 1
    return extra


def widened(unet: dict, variance: str) -> dict:
    """The config of a U-Net with the input channels of inpainting, unless it already has them.

    Example:
        >>> widened(dict(in_channels=3, out_channels=3), "fixed_small")["in_channels"]
        7
    """
    channels = unet.get("in_channels", 3)
    out = unet.get("out_channels", 6) // (2 if variance == "learned_range" else 1)
    return unet | {"in_channels": 2 * channels + 1} if channels == out else unet


def check_channels(unet: UNet, variance: str, inpaint: bool) -> None:
    """Raise ValueError unless the U-Net has the channels that `variance` and `inpaint` need."""
    factor = 2 if variance == "learned_range" else 1
    if inpaint:
        expected = 2 * (unet.out_channels // factor) + 1
        if unet.in_channels != expected or unet.out_channels % factor:
            raise ValueError(
                f"unet: expected in_channels = 2 C + 1 = {expected} for inpaint=True and out_channels = "
                f"{unet.out_channels}, got {unet.in_channels}"
            )
    elif unet.out_channels != unet.in_channels * factor:
        raise ValueError(
            f"unet: expected out_channels = {unet.in_channels * factor} for variance={variance!r}, got "
            f"{unet.out_channels}"
        )


def with_inpainting(kind: type[Decoder], decoder: Decoder) -> Decoder:
    """A copy of a decoder, of class `kind`, with inpaint=True and zero weights for the new channels."""
    if decoder.inpaint:
        raise ValueError("decoder: expected one with inpaint=False, got inpaint=True")
    with unfilled():  # draw no initial weights, because all are copied below
        wider = kind(**decoder.config | {"inpaint": True}, clip=decoder.clip)
    channels, weights = decoder.channels, wider.state_dict()
    for name, old in decoder.state_dict().items():
        if old.shape != weights[name].shape:  # a first convolution: [x, new channels, other channels]
            cells = old.new_zeros(weights[name].shape)
            patch = wider.unet.patch_size if name == "unet.conv_in.weight" else wider.unet.fine.patch_size
            head, added = channels * patch**2, (channels + 1) * patch**2
            cells[:, :head], cells[:, head + added :] = old[:, :head], old[:, head:]
            old = cells
        weights[name] = old
    wider.load_state_dict(weights)
    return wider.to(decoder.unet.conv_in.weight).train(decoder.training)
