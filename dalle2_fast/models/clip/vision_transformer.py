"""CLIP's vision Transformer: patches, or a convolutional stem, a class token, and its projection.

The weights have OpenAI's names. Source: Radford et al., "CLIP", 2103.00020, section 2.4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dalle2_fast.models.transformer import Transformer
from dalle2_fast.modules import GroupNormSiLU


def convolution_stem(width: int, patch_size: int) -> nn.Sequential:
    """Stride-2 3x3 convolutions down to one pixel per patch, then a 1x1 convolution to `width`.

    The stem replaces the patch embedding where images are few and small, because it learns edges sooner.

    Args:
        width: channels of the output, divisible by 4 * patch_size.
        patch_size: side of a patch in pixels, a power of two >= 2.

    Raises:
        ValueError: patch_size or width is not of this kind.

    Source: Xiao et al., 2106.14881.

    Example:
        >>> convolution_stem(16, 4)(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 16, 2, 2])
    """
    groups = 8
    steps = patch_size.bit_length() - 1
    if steps < 1 or 2**steps != patch_size or width % (groups * patch_size // 2):
        raise ValueError(
            "conv_vit: expected visual_patch_size a power of two >= 2 and dim_image divisible by "
            f"{groups // 2} * visual_patch_size, got visual_patch_size={patch_size}, dim_image={width}"
        )
    layers: list[nn.Module] = []
    channels = 3
    for step in range(steps):
        out_channels = width // 2 ** (steps - 1 - step)
        layers += [
            nn.Conv2d(channels, out_channels, 3, stride=2, padding=1, bias=False),
            GroupNormSiLU(groups, out_channels),
        ]
        channels = out_channels
    return nn.Sequential(*layers, nn.Conv2d(channels, width, 1, bias=False))


class VisionTransformer(nn.Module):
    """Normalised images [B, 3, S, S] -> the embedding [B, output_dim] of the class token, not normalised.

    Args:
        image_size: side S of the images in pixels.
        patch_size: side of a patch, which divides image_size.
        width: width of the tokens.
        depth: the number of blocks.
        heads: the number of attention heads.
        output_dim: width of the embedding.
        mlp_ratio: width of the hidden layer of the MLPs, as a multiple of width.
        quick_gelu: whether the activation is QuickGELU, as in OpenAI's weights.
        stem: whether `convolution_stem` replaces the patch embedding.

    Raises:
        ValueError: patch_size does not divide image_size.

    Example:
        >>> tower = VisionTransformer(16, 8, width=16, depth=1, heads=2, output_dim=8)
        >>> tower(torch.randn(1, 3, 16, 16)).shape
        torch.Size([1, 8])
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        output_dim: int,
        *,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = False,
        stem: bool = False,
    ):
        super().__init__()
        if patch_size < 1 or image_size % patch_size:
            raise ValueError(
                f"visual_image_size: expected a multiple of the patch size {patch_size}, got {image_size}"
            )
        scale = width**-0.5
        if stem:
            self.conv1 = convolution_stem(width, patch_size)
        else:
            self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        positions = (image_size // patch_size) ** 2 + 1
        self.positional_embedding = nn.Parameter(scale * torch.randn(positions, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, depth, heads, mlp_ratio=mlp_ratio, quick_gelu=quick_gelu)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, output_dim))

    def forward(self, images: Tensor) -> Tensor:
        """Embed normalised images [B, 3, S, S] -> [B, output_dim]."""
        x = self.conv1(images).flatten(2).transpose(1, 2)
        # Not len(x), which is a constant in an exported program.
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        x = self.transformer(x)
        return self.ln_post(x[:, 0]) @ self.proj
