"""CLIP's modified ResNet: three-convolution stem, anti-aliased strides, attention pooling.

The weights have OpenAI's names. Source: Radford et al., "CLIP", 2103.00020, section 2.4; ResNet-D after He et
al. 2019; rect-2 blur pooling after Zhang 2019.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """A residual block of 1x1, 3x3 and 1x1 convolutions with 4x expansion.

    A stride is an average pool before the last convolution.

    Args:
        in_channels: channels of the input.
        channels: channels of the 3x3 convolution; the output has 4 times as many.
        stride: 1, or the factor by which the block reduces the resolution.

    Example:
        >>> Bottleneck(8, 4, stride=2)(torch.randn(1, 8, 6, 6)).shape
        torch.Size([1, 16, 3, 3])
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1):
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride > 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(OrderedDict([
                ("-1", nn.AvgPool2d(stride) if stride > 1 else nn.Identity()),
                ("0", nn.Conv2d(in_channels, out_channels, 1, bias=False)),
                ("1", nn.BatchNorm2d(out_channels)),
            ]))
        nn.init.zeros_(self.bn3.weight)  # an untrained block is its shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.avgpool(out)))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(out + shortcut)


class AttentionPool(nn.Module):
    """Attention whose only query is the mean over all positions: [B, C, h, w] -> [B, output_dim].

    Args:
        grid: h = w, the side of the input in cells.
        channels: channels C of the input.
        heads: the number of attention heads.
        output_dim: width of the output.

    Example:
        >>> AttentionPool(2, channels=8, heads=2, output_dim=4)(torch.randn(1, 8, 2, 2)).shape
        torch.Size([1, 4])
    """

    def __init__(self, grid: int, channels: int, heads: int, output_dim: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid + 1, channels) * channels**-0.5)
        self.k_proj = nn.Linear(channels, channels)
        self.q_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.c_proj = nn.Linear(channels, output_dim)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(linear.weight, std=channels**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
        x = x + self.positional_embedding.to(x.dtype)
        q, k, v = (
            project(source).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project, source in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x))
        )
        pooled = F.scaled_dot_product_attention(q, k, v)  # [B, heads, 1, C / heads]
        return self.c_proj(pooled.flatten(1))


class ModifiedResNet(nn.Module):
    """Normalised images [B, 3, S, S] -> the embedding [B, output_dim], not normalised.

    Args:
        layers: the number of blocks in each of the four stages, (3, 4, 6, 3) for RN50.
        width: channels after the stem, even; 64 for RN50.
        heads: the number of heads of the attention pool, which divides its width 32 * width.
        image_size: side S of the images in pixels, a multiple of 32.
        output_dim: width of the embedding.

    Raises:
        ValueError: a size is impossible.

    Example:
        >>> network = ModifiedResNet((1, 1, 1, 1), width=4, heads=2, image_size=32, output_dim=8).eval()
        >>> network(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 8])
    """

    def __init__(self, layers: tuple[int, ...], width: int, heads: int, image_size: int, output_dim: int):
        super().__init__()
        if len(layers) != 4 or image_size % 32 or width % 2 or (width * 32) % heads:
            raise ValueError(
                "resnet: expected 4 stage depths, image_size a multiple of 32, an even width, heads dividing "
                f"32 * width, got {tuple(layers)}, image_size={image_size}, width={width}, heads={heads}"
            )
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        channels = width
        for stage, depth in enumerate(layers):
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(Bottleneck(channels, width * 2**stage, stride))
                channels = width * 2**stage * Bottleneck.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool(image_size // 32, channels, heads, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.avgpool(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.attnpool(x)
