"""The ADM U-Net of unCLIP's decoder and upsamplers: eps(x_t, t, context, classes), convolution and attention.

The defaults are those of the public unCLIP decoder, 885,439,686 parameters.

Source: Dhariwal and Nichol, "ADM", 2105.05233; Nichol et al., "GLIDE", 2112.10741, for the keys of the text
in the self-attention of the image; Ramesh et al., "unCLIP", 2204.06125, section 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.models.time_embedding import sinusoidal_embedding
from dalle2_fast.models.unet.blocks import AttentionBlock, FineLevel, Layout, ResBlock
from dalle2_fast.models.unet.checks import check_context, check_fine, check_widths, per_level
from dalle2_fast.models.unet.context import ContextCache, ContextReader
from dalle2_fast.modules import GroupNormSiLU


class UNet(nn.Module):
    """ADM U-Net, called as net(sample, timestep, encoder_hidden_states, class_labels, attention_mask).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output; 6 = 3 + 3 for a learned variance.
        channels: width of each level; each level after the first halves the resolution.
        layers_per_block: residual blocks per level, one int or one per level; the way up has one more.
        attention_levels: the levels with attention after each residual block. The middle has attention if any
            level has.
        head_dim: width of an attention head, one int or one per level.
        cross_dim: width of `encoder_hidden_states`; None for self-attention only.
        embed_dim: width of the time embedding; None is 4 * channels[0].
        class_embed_dim: width of `class_labels`, which are then projected and added to the time embedding.
            None: `class_labels`, if given, have embed_dim columns and are added directly.
        patch_size: p > 1 runs the network on patches of p x p pixels (pixel-unshuffle before it,
            pixel-shuffle after it).
        num_groups: groups of every group norm; must divide every width.
        film: whether the embedding scales and shifts (True) or is added (False).
        dropout: dropout probability in the residual blocks.
        kernel_in: size of the first convolution, odd.
        kernel_out: size of the last convolution, odd.
        narrow_up: whether the blocks that double the resolution already narrow to the width of the next
            level. ADM keeps the width there, which is the most expensive place of a network with few levels:
            with channels (64, 192) a quarter of all multiplications.
        grid_size: adds to every cell of the first grid a linear map of the embedding for this cell (see
            `Layout`), which fixes the image size at grid_size * patch_size. Without it, as in ADM, a network
            learns where things go from the zero padding at the border and from FiLM; with little training
            it learns this late.
        fine: dict(patch_size, channels, layers) of a level on smaller patches that corrects the image of a
            network on large patches (see `FineLevel`); its patch_size must divide that of the network.

    Raises:
        ValueError: the sizes do not fit each other.

    Example:
        >>> net = UNet(in_channels=3, out_channels=3, channels=(8, 16), layers_per_block=1,
        ...            attention_levels=(1,), head_dim=8, cross_dim=6, num_groups=4)
        >>> image, time, context = torch.randn(2, 3, 8, 8), torch.tensor([0.0, 500.0]), torch.randn(2, 5, 6)
        >>> net(image, time, context).shape
        torch.Size([2, 3, 8, 8])
        >>> cache = net.encode_context(context)  # computed once for all sampling steps
        >>> torch.equal(net(image, time, cache), net(image, time, context))
        True
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 6,
        channels: Sequence[int] = (320, 640, 960, 1280),
        layers_per_block: int | Sequence[int] = 3,
        attention_levels: Sequence[int] = (1, 2, 3),
        head_dim: int | Sequence[int] = 64,
        cross_dim: int | None = 1536,
        embed_dim: int | None = None,
        class_embed_dim: int | None = None,
        patch_size: int = 1,
        num_groups: int = 32,
        film: bool = True,
        dropout: float = 0.0,
        kernel_in: int = 3,
        kernel_out: int = 3,
        narrow_up: bool = False,
        grid_size: int | None = None,
        fine: dict[str, int] | None = None,
    ):
        super().__init__()
        channels = tuple(channels)
        levels = len(channels)
        layers = per_level("layers_per_block", layers_per_block, levels)
        head_dims = per_level("head_dim", head_dim, levels)
        attention_levels = tuple(sorted(set(attention_levels)))
        check_widths(channels, layers, attention_levels, head_dims, num_groups, patch_size)
        if kernel_in % 2 == 0 or kernel_out % 2 == 0:
            raise ValueError(f"kernel_in, kernel_out: expected odd sizes, got {kernel_in}, {kernel_out}")
        embed_dim = 4 * channels[0] if embed_dim is None else embed_dim
        self.config = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "channels": list(channels),
            "layers_per_block": list(layers),
            "attention_levels": list(attention_levels),
            "head_dim": list(head_dims),
            "cross_dim": cross_dim,
            "embed_dim": embed_dim,
            "class_embed_dim": class_embed_dim,
            "patch_size": patch_size,
            "num_groups": num_groups,
            "film": film,
            "dropout": dropout,
            "kernel_in": kernel_in,
            "kernel_out": kernel_out,
            "narrow_up": narrow_up,
            "grid_size": grid_size,
            "fine": None if fine is None else dict(fine),
        }
        self.in_channels, self.out_channels = in_channels, out_channels
        self.cross_dim, self.embed_dim, self.class_embed_dim = cross_dim, embed_dim, class_embed_dim
        self.patch_size = patch_size
        self.size_multiple = patch_size * 2 ** (levels - 1)
        self.time_dim = channels[0]

        def res(before: int, after: int, resample: str | None = None) -> ResBlock:
            return ResBlock(before, after, embed_dim, num_groups, film, resample, dropout)

        def attention(level: int) -> AttentionBlock | None:
            if level not in attention_levels:
                return None
            return AttentionBlock(channels[level], head_dims[level], cross_dim, num_groups)

        widen, mix = nn.Linear(self.time_dim, embed_dim), nn.Linear(embed_dim, embed_dim)
        self.time_embed = nn.Sequential(widen, nn.SiLU(), mix)
        self.class_embed = nn.Linear(class_embed_dim, embed_dim) if class_embed_dim is not None else None
        patches = patch_size**2
        self.conv_in = nn.Conv2d(in_channels * patches, channels[0], kernel_in, padding=kernel_in // 2)

        self.layout = None if grid_size is None else Layout(embed_dim, channels[0], grid_size)

        width, skips = channels[0], [channels[0]]
        self.down = nn.ModuleList()
        for level in range(levels):
            for _ in range(layers[level]):
                self.down.append(_Layer(res(width, channels[level]), attention(level)))
                width = channels[level]
                skips.append(width)
            if level < levels - 1:
                self.down.append(_Layer(res(width, width, "down"), None))
                skips.append(width)

        last = levels - 1
        middle_attention = attention_levels and AttentionBlock(width, head_dims[last], cross_dim, num_groups)
        self.middle = nn.ModuleList(
            [_Layer(res(width, width), middle_attention or None), _Layer(res(width, width), None)]
        )

        self.up = nn.ModuleList()
        for level in reversed(range(levels)):
            for _ in range(layers[level] + 1):
                self.up.append(
                    _Layer(res(width + skips.pop(), channels[level]), attention(level), takes_skip=True)
                )
                width = channels[level]
            if level > 0:
                before, width = width, channels[level - 1] if narrow_up else width
                self.up.append(_Layer(res(before, width, "up"), None))

        self.norm_out = GroupNormSiLU(num_groups, width)
        self.conv_out = nn.Conv2d(width, out_channels * patches, kernel_out, padding=kernel_out // 2)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)
        self.fine = None
        if fine is not None:
            check_fine(fine, patch_size, num_groups)
            self.fine = FineLevel(
                in_channels, out_channels, width, patch_size // fine["patch_size"], **fine,
                embed_dim=embed_dim, num_groups=num_groups, film=film,
            )

    def attention_blocks(self) -> list[AttentionBlock]:
        """The attention layers in the order in which `forward` calls them."""
        layers = [*self.down, *self.middle, *self.up]
        return [layer.attention for layer in layers if layer.attention is not None]

    def encode_context(
        self,
        context: Tensor,  # [B, S, cross_dim]
        mask: Tensor | None = None,  # bool [B, S], True = attend
    ) -> ContextCache:
        """Compute once the keys and values of a context that `forward` would compute in every step.

        Raises:
            ValueError: the context or the mask has the wrong shape, or this network takes no context.
        """
        check_context(context, mask, self.cross_dim)
        context = context.to(self.conv_in.weight.dtype)
        pairs = [block.encode_context(context) for block in self.attention_blocks()]
        return ContextCache(tuple(k for k, _ in pairs), tuple(v for _, v in pairs), mask)

    def forward(
        self,
        sample: Tensor,  # [B, in_channels, H, W]
        timestep: Tensor,  # [B], 0..1000
        encoder_hidden_states: Tensor | ContextCache | None = None,  # [B, S, cross_dim]
        class_labels: Tensor | None = None,  # [B, embed_dim], or [B, class_embed_dim]
        attention_mask: Tensor | None = None,  # bool [B, S], True = attend
    ) -> Tensor:  # [B, out_channels, H, W], dtype of sample
        """Predict from a noisy image; computed in the dtype of the weights (autocast applies).

        Args:
            sample: noisy image; H and W are multiples of patch_size * 2 ** (levels - 1).
            timestep: time of each sample, 0 .. 1000.
            encoder_hidden_states: the context, or its cache from `encode_context`; None for none.
            class_labels: class embedding, see class_embed_dim; None for none.
            attention_mask: mask of the context; a cache already contains its mask.

        Returns:
            [B, out_channels, H, W] in the dtype of `sample`.

        Raises:
            ValueError: an argument has another shape.
        """
        self._check_sample(sample, timestep)
        dtype = self.conv_in.weight.dtype
        # The embedding and the blocks' maps of it could be computed once per sampling run. For 16 rows of the
        # decoder in the package they are below 1 % of a step on a CPU, in float32 and in bfloat16.
        embed = self.time_embed(sinusoidal_embedding(timestep, self.time_dim).to(dtype))
        if class_labels is not None:
            embed = embed + self._embed_classes(class_labels.to(dtype))
        embed = F.silu(embed)

        cache = encoder_hidden_states
        if isinstance(cache, ContextCache):
            if attention_mask is not None:
                raise ValueError("attention_mask: a ContextCache contains a mask, got a second one")
        elif cache is not None:
            cache = self.encode_context(cache, attention_mask)
        context = ContextReader(cache)

        hidden = sample.to(dtype)
        if self.patch_size > 1:
            hidden = F.pixel_unshuffle(hidden, self.patch_size)
        # Convolutions keep the memory format. In channels_last, reshaping pixels into tokens copies nothing.
        hidden = self.conv_in(hidden.contiguous(memory_format=torch.channels_last))
        if self.layout is not None:
            hidden = hidden + self.layout(embed)
        skips = [hidden]
        for layer in self.down:
            hidden = layer(hidden, embed, context)
            skips.append(hidden)
        for layer in self.middle:
            hidden = layer(hidden, embed, context)
        for layer in self.up:
            if layer.takes_skip:
                hidden = torch.cat([hidden, skips.pop()], dim=1)
            hidden = layer(hidden, embed, context)
        features = self.norm_out(hidden)
        image = self.conv_out(features)
        if self.patch_size > 1:
            image = F.pixel_shuffle(image, self.patch_size)
        if self.fine is not None:
            image = self.fine(sample.to(dtype), image, features, embed)
        return image.to(sample.dtype, memory_format=torch.contiguous_format)

    def _embed_classes(self, class_labels: Tensor) -> Tensor:
        expected = self.embed_dim if self.class_embed is None else self.class_embed_dim
        if class_labels.ndim != 2 or class_labels.shape[1] != expected:
            raise ValueError(f"class_labels: expected [B, {expected}], got {tuple(class_labels.shape)}")
        return class_labels if self.class_embed is None else self.class_embed(class_labels)

    def _check_sample(self, sample: Tensor, timestep: Tensor) -> None:
        if sample.ndim != 4 or sample.shape[1] != self.in_channels:
            raise ValueError(f"sample: expected [B, {self.in_channels}, H, W], got {tuple(sample.shape)}")
        if sample.shape[2] % self.size_multiple or sample.shape[3] % self.size_multiple:
            raise ValueError(
                f"sample: height and width must be multiples of {self.size_multiple} (patch_size times 2 "
                f"per level after the first), got {tuple(sample.shape)}"
            )
        side = self.patch_size * self.config["grid_size"] if self.layout is not None else None
        if side is not None and sample.shape[2:] != (side, side):
            raise ValueError(f"sample: grid_size asks for {side} x {side} pixels, got {tuple(sample.shape)}")
        if timestep.shape != sample.shape[:1]:
            raise ValueError(f"timestep: expected [B] = ({sample.shape[0]},), got {tuple(timestep.shape)}")


class _Layer(nn.Module):
    """A residual block and, at the levels that have attention, an attention block.

    Args:
        res: the residual block.
        attention: the attention block, or None.
        takes_skip: whether the input is concatenated with a skip connection.
    """

    def __init__(self, res: ResBlock, attention: AttentionBlock | None, takes_skip: bool = False):
        super().__init__()
        self.res = res
        self.attention = attention
        self.takes_skip = takes_skip

    def forward(self, x: Tensor, embed: Tensor, context: ContextReader) -> Tensor:
        x = self.res(x, embed)
        return x if self.attention is None else self.attention(x, *context.next())
