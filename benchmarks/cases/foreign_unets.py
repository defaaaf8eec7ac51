"""U-Nets of other packages on which `dalle2_fast.patch` is measured and tested, in full size or small.

The small ones have the same kinds of blocks with smaller widths. Weights are random; nothing is downloaded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_SIMPLE = dict(
    down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3),
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"),
    resnet_time_scale_shift="scale_shift", layers_per_block=3, attention_head_dim=64, sample_size=64,
)  # fmt: skip
_CONFIGS = {
    "karlo decoder": dict(
        _SIMPLE, in_channels=3, out_channels=6, block_out_channels=(320, 640, 960, 1280),
        cross_attention_dim=1536, class_embed_type="identity",
    ),
    "karlo upsampler": dict(
        in_channels=6, out_channels=3, block_out_channels=(320, 640, 960, 1280), layers_per_block=3,
        down_block_types=("ResnetDownsampleBlock2D",) * 4, up_block_types=("ResnetUpsampleBlock2D",) * 4,
        add_attention=False, sample_size=256,
    ),
    "kandinsky 2.2": dict(
        _SIMPLE, in_channels=4, out_channels=8, block_out_channels=(384, 768, 1152, 1536),
        cross_attention_dim=768, encoder_hid_dim=1280, encoder_hid_dim_type="image_proj",
        addition_embed_type="image",
    ),
    "stable diffusion 1.5": dict(cross_attention_dim=768, sample_size=64),
    "dalle2-pytorch": dict(
        dim=128, image_embed_dim=512, text_embed_dim=512, cond_dim=128, channels=3, dim_mults=(1, 2, 4, 8),
        cond_on_text_encodings=True, cond_on_image_embeds=True,
    ),
}  # fmt: skip
_SMALL_NET = dict(block_out_channels=(8, 16, 24), layers_per_block=1, norm_num_groups=4, sample_size=16)
_SMALL_SIMPLE = dict(
    _SMALL_NET,
    cross_attention_dim=12,
    attention_head_dim=8,
    down_block_types=("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 2),
    up_block_types=(*["SimpleCrossAttnUpBlock2D"] * 2, "ResnetUpsampleBlock2D"),
)
_SMALL = {
    "karlo decoder": _SMALL_SIMPLE,
    "karlo upsampler": dict(
        _SMALL_NET,
        down_block_types=("ResnetDownsampleBlock2D",) * 3,
        up_block_types=("ResnetUpsampleBlock2D",) * 3,
    ),
    "kandinsky 2.2": dict(_SMALL_SIMPLE, encoder_hid_dim=10),
    "stable diffusion 1.5": dict(
        _SMALL_NET,
        cross_attention_dim=12,
        attention_head_dim=2,
        down_block_types=(*["CrossAttnDownBlock2D"] * 2, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 2),
    ),
    "dalle2-pytorch": dict(
        dim=16, image_embed_dim=20, text_embed_dim=12, cond_dim=16, dim_mults=(1, 2), self_attn=(True, False),
        attn_heads=2, attn_dim_head=8,
    ),
}  # fmt: skip
NAMES = tuple(_CONFIGS)


def package(name: str) -> str:
    """The package that must be importable to build the U-Net of this name."""
    return "dalle2_pytorch" if name == "dalle2-pytorch" else "diffusers"


def build(name: str, *, small: bool = False, **changes) -> nn.Module:
    """The U-Net, on the default device and dtype. changes: other arguments of its constructor."""
    config = {**_CONFIGS[name], **(_SMALL[name] if small else {}), **changes}
    if package(name) == "dalle2_pytorch":
        from dalle2_pytorch import Unet

        return Unet(**config)
    import diffusers

    return getattr(diffusers, "UNet2DModel" if "upsampler" in name else "UNet2DConditionModel")(**config)


def inputs(
    name: str, net: nn.Module, batch: int, generator: torch.Generator | None = None, **options
) -> dict:
    """Keyword arguments for `run`. options: device and dtype of the floating-point ones."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, **options)

    device = options.get("device")
    time = torch.arange(1, batch + 1, device=device) * 7
    if name == "dalle2-pytorch":
        small = net.channels_out == 3 and net.null_image_hiddens.shape[1] < 128
        side, tokens, width = (16, 5, 20) if small else (64, 77, 512)
        return dict(x=randn(batch, 3, side, side), time=time, image_embed=randn(batch, width),
                    text_encodings=randn(batch, tokens, net.text_to_cond.in_features))  # fmt: skip
    config = net.config
    given = dict(
        sample=randn(batch, config.in_channels, config.sample_size, config.sample_size), timestep=time
    )
    if name == "karlo upsampler":
        return given
    small = config.cross_attention_dim < 100
    tokens = 5 if small else 77
    if name == "kandinsky 2.2":
        embeds = randn(batch, config.encoder_hid_dim)
        return given | dict(encoder_hidden_states=None, added_cond_kwargs=dict(image_embeds=embeds))
    if name == "karlo decoder":
        tokens += 4
        lengths = torch.arange(batch, device=device) % tokens + 2
        given["attention_mask"] = torch.arange(tokens, device=device) < lengths[:, None]
        given["class_labels"] = randn(batch, config.block_out_channels[0] * 4)
    return given | dict(encoder_hidden_states=randn(batch, tokens, config.cross_attention_dim))


def run(net: nn.Module, given: dict) -> Tensor:
    """The U-Net's prediction."""
    result = net(**given)
    return result if isinstance(result, Tensor) else result.sample
