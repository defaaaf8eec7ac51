"""ADM's U-Net and GLIDE's text tower stated a second time: names, shapes and operations, without our modules.

Written from the papers (2105.05233, 2112.10741) and the names of the published tensors, with plain functions
of torch on a dict of tensors. The tests hold the loaders to it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def _layer(shapes: Shapes, name: str, *weight: int) -> None:
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, weight[:1]


def _res(shapes: Shapes, name: str, before: int, after: int, embed: int, film: bool) -> None:
    _layer(shapes, f"{name}.in_layers.0", before)
    _layer(shapes, f"{name}.in_layers.2", after, before, 3, 3)
    _layer(shapes, f"{name}.emb_layers.1", (2 if film else 1) * after, embed)
    _layer(shapes, f"{name}.out_layers.0", after)
    _layer(shapes, f"{name}.out_layers.3", after, after, 3, 3)
    if before != after:
        _layer(shapes, f"{name}.skip_connection", after, before, 1, 1)


def _attention(shapes: Shapes, name: str, width: int, text: int | None) -> None:
    _layer(shapes, f"{name}.norm", width)
    _layer(shapes, f"{name}.qkv", 3 * width, width, 1)
    if text is not None:
        _layer(shapes, f"{name}.encoder_kv", 2 * width, text, 1)
    _layer(shapes, f"{name}.proj_out", width, width, 1)


def unet_shapes(
    model_channels: int, mults: tuple[float, ...], blocks: int, attention_levels: tuple[int, ...],
    in_channels: int = 3, out_channels: int = 6, classes: int | None = None, film: bool = True,
    text: int | None = None,
) -> Shapes:  # fmt: skip
    """Name -> shape, for the flags num_channels, channel_mult, num_res_blocks and the levels that attend."""
    shapes: Shapes = {}
    embed, widths = 4 * model_channels, [int(model_channels * mult) for mult in mults]
    _layer(shapes, "time_embed.0", embed, model_channels)
    _layer(shapes, "time_embed.2", embed, embed)
    if classes is not None:
        shapes["label_emb.weight"] = (classes, embed)
    _layer(shapes, "input_blocks.0.0", widths[0], in_channels, 3, 3)
    width, skips, station = widths[0], [widths[0]], 1
    for level, after in enumerate(widths):
        for _ in range(blocks):
            _res(shapes, f"input_blocks.{station}.0", width, after, embed, film)
            if level in attention_levels:
                _attention(shapes, f"input_blocks.{station}.1", after, text)
            width, station = after, station + 1
            skips.append(width)
        if level < len(widths) - 1:
            _res(shapes, f"input_blocks.{station}.0", width, width, embed, film)
            skips.append(width)
            station += 1
    _res(shapes, "middle_block.0", width, width, embed, film)
    _attention(shapes, "middle_block.1", width, text)
    _res(shapes, "middle_block.2", width, width, embed, film)
    station = 0
    for level in reversed(range(len(widths))):
        for index in range(blocks + 1):
            begin = f"output_blocks.{station}"
            _res(shapes, f"{begin}.0", width + skips.pop(), widths[level], embed, film)
            width = widths[level]
            if level in attention_levels:
                _attention(shapes, f"{begin}.1", width, text)
            if level and index == blocks:
                _res(shapes, f"{begin}.{1 + (level in attention_levels)}", width, width, embed, film)
            station += 1
    _layer(shapes, "out.0", width)
    _layer(shapes, "out.2", out_channels, width, 3, 3)
    return shapes


def text_shapes(tokens: int, length: int, width: int, depth: int, embed: int) -> Shapes:
    """Name -> shape of GLIDE's text tower."""
    shapes: Shapes = {
        "token_embedding.weight": (tokens, width), "positional_embedding": (length, width),
        "padding_embedding": (length, width),
    }  # fmt: skip
    _layer(shapes, "final_ln", width)
    _layer(shapes, "transformer_proj", embed, width)
    for block in range(depth):
        name = f"transformer.resblocks.{block}"
        _layer(shapes, f"{name}.ln_1", width)
        _layer(shapes, f"{name}.ln_2", width)
        _layer(shapes, f"{name}.attn.c_qkv", 3 * width, width)
        _layer(shapes, f"{name}.attn.c_proj", width, width)
        _layer(shapes, f"{name}.mlp.c_fc", 4 * width, width)
        _layer(shapes, f"{name}.mlp.c_proj", width, 4 * width)
    return shapes


def random_tensors(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Tensors of these shapes whose products stay about as large as their inputs, in float32."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        if len(shape) > 1 and "embedding" not in name and "_emb." not in name:
            x = x / math.sqrt(math.prod(shape[1:]))
        elif name.endswith("weight"):
            x = 1 + 0.2 * x
        made[name] = x
    return made


# ----------------------------------------------------------------------------------------------- operations


class Net:
    """The operations on a dict of tensors."""

    def __init__(
        self, tensors: dict[str, Tensor], *, head_dim: int | None = None, heads: int | None = None,
        new_order: bool = False,
    ) -> None:  # fmt: skip
        self.tensors, self.head_dim, self.heads, self.new_order = tensors, head_dim, heads, new_order

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        return F.linear(x, weight.flatten(1), self.tensors[f"{name}.bias"])

    def conv(self, name: str, x: Tensor) -> Tensor:
        weight = self.tensors[f"{name}.weight"]
        return F.conv2d(x, weight, self.tensors[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], 1e-5)

    def res(self, name: str, x: Tensor, embed: Tensor, resample: str | None) -> Tensor:
        h = F.silu(self.norm(f"{name}.in_layers.0", x))
        if resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif resample == "up":
            h, x = (y.repeat_interleave(2, 2).repeat_interleave(2, 3) for y in (h, x))
        h = self.conv(f"{name}.in_layers.2", h)
        shift = self.linear(f"{name}.emb_layers.1", F.silu(embed))[:, :, None, None]
        if shift.shape[1] == 2 * h.shape[1]:
            scale, shift = shift.chunk(2, dim=1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + shift)
        h = self.conv(f"{name}.out_layers.3", F.silu(h))
        skip = f"{name}.skip_connection"
        return h + (self.conv(skip, x) if f"{skip}.weight" in self.tensors else x)

    def split(self, rows: Tensor, parts: int, heads: int) -> list[Tensor]:
        """[B, T, rows] -> parts of [B, heads, T, width]."""
        order = (parts, heads, -1) if self.new_order else (heads, parts, -1)
        axes = (2, 0, 3, 1, 4) if self.new_order else (3, 0, 2, 1, 4)
        return list(rows.unflatten(2, order).permute(*axes))

    def attention(self, name: str, x: Tensor, text: Tensor | None) -> Tensor:
        tokens = self.norm(f"{name}.norm", x).flatten(2).transpose(1, 2)
        heads = self.heads or x.shape[1] // self.head_dim
        q, k, v = self.split(self.linear(f"{name}.qkv", tokens), 3, heads)
        if text is not None:
            text_k, text_v = self.split(self.linear(f"{name}.encoder_kv", text), 2, heads)
            k, v = torch.cat([text_k, k], dim=2), torch.cat([text_v, v], dim=2)
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        out = self.linear(f"{name}.proj_out", (weights @ v).transpose(1, 2).flatten(2))
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])

    def station(
        self, name: str, x: Tensor, embed: Tensor, text: Tensor | None, resample: int | None
    ) -> Tensor:
        """The parts of a station in order; the residual block with the number `resample` resamples."""
        for number in range(3):
            part = f"{name}.{number}"
            if f"{part}.qkv.weight" in self.tensors:
                x = self.attention(part, x, text)
            elif f"{part}.in_layers.2.weight" in self.tensors:
                direction = "down" if name.startswith("input") else "up"
                x = self.res(part, x, embed, direction if number == resample else None)
            elif f"{part}.weight" in self.tensors:
                x = self.conv(part, x)
        return x

    def count(self, prefix: str) -> int:
        return len({name.split(".")[1] for name in self.tensors if name.startswith(f"{prefix}.")})

    def unet(
        self, x: Tensor, t: Tensor, labels: Tensor | None = None, vector: Tensor | None = None,
        text: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        width = self.tensors["time_embed.0.weight"].shape[1]
        angle = t[:, None].double() * 10000.0 ** (-torch.arange(width // 2).double() / (width // 2))
        embed = torch.cat([angle.cos(), angle.sin()], dim=1).to(x.dtype)
        embed = self.linear("time_embed.2", F.silu(self.linear("time_embed.0", embed)))
        if labels is not None:
            embed = embed + self.tensors["label_emb.weight"][labels]
        if vector is not None:
            embed = embed + vector
        stations = self.count("input_blocks")
        levels = 1 + sum(
            f"output_blocks.{s}.{n}.in_layers.2.weight" in self.tensors
            for s in range(self.count("output_blocks")) for n in (1, 2)
        )  # fmt: skip
        per_level = stations // levels  # conv or resampling, and the blocks
        hidden = []
        for number in range(stations):
            down = 0 if number and number % per_level == 0 else None
            x = self.station(f"input_blocks.{number}", x, embed, text, down)
            hidden.append(x)
        x = self.station("middle_block", x, embed, text, None)
        for number in range(self.count("output_blocks")):
            name = f"output_blocks.{number}"
            up = 2 if f"{name}.2.in_layers.2.weight" in self.tensors else 1
            x = self.station(name, torch.cat([x, hidden.pop()], dim=1), embed, text, up)
        return self.conv("out.2", F.silu(self.norm("out.0", x)))

    def tower(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """GLIDE's text tower: the vector and the encodings."""
        x = self.tensors["token_embedding.weight"][tokens] + self.tensors["positional_embedding"]
        x = torch.where(mask[:, :, None], x, self.tensors["padding_embedding"])

        def layer_norm(name: str, x: Tensor) -> Tensor:
            weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
            return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

        for block in range(len({n.split(".")[2] for n in self.tensors if n.startswith("transformer.")})):
            name = f"transformer.resblocks.{block}"
            qkv = self.linear(f"{name}.attn.c_qkv", layer_norm(f"{name}.ln_1", x))
            q, k, v = self.split(qkv, 3, x.shape[-1] // self.head_dim)
            weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(dim=-1)
            x = x + self.linear(f"{name}.attn.c_proj", (weights @ v).transpose(1, 2).flatten(2))
            hidden = F.gelu(self.linear(f"{name}.mlp.c_fc", layer_norm(f"{name}.ln_2", x)))
            x = x + self.linear(f"{name}.mlp.c_proj", hidden)
        x = layer_norm("final_ln", x)
        return self.linear("transformer_proj", x[:, -1]), x
