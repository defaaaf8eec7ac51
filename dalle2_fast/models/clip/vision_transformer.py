"""CLIP's vision Transformer: patches, or a convolutional stem, a class token, and its projection.

Source: CLIP, arXiv 2103.00020, section 2.4. Weight names are OpenAI's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dalle2_fast.models.transformer import Transformer
from dalle2_fast.modules import GroupNormSiLU


def convolution_stem(width: int, patch_size: int) -> nn.Sequential:
    """Stride-2 3x3 convolutions down to one pixel per patch, then a 1x1 to `width` (arXiv 2106.14881).

    It replaces the patch embedding where images are few and small: edges are learned sooner.
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
    """Normalised images [B, 3, S, S] -> embedding [B, output_dim] (not normalised) at the class token."""

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
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        x = self.transformer(x)
        return self.ln_post(x[:, 0]) @ self.proj
