"""Blocks of plain torch, and the residual block of guided-diffusion's family, with fused group norms.

guided-diffusion (Dhariwal and Nichol, 2105.05233), GLIDE, Karlo and latent diffusion each have a copy of one
block: in_layers, emb_layers, out_layers, skip_connection. It is recognised by these attributes and by the
names that its forward uses; none of the packages is imported.
"""

from __future__ import annotations

import inspect
import types

from torch import Tensor, nn

from dalle2_fast import functional
from dalle2_fast.adapters._swap import Patched, PatchRule, why_overridden
from dalle2_fast.modules import GroupNormSiLU

# ------------------------------------------------------------------------------------------------- group norm


class FusedGroupNorm(Patched):
    """`nn.GroupNorm`, optionally with a scale, a shift and SiLU in the same op.

    The blocks around it pass these when they call it as a module, so that its hooks (FSDP, offloading) see
    every call. swish: 1.0 in GLIDE's GroupNorm32, which applies SiLU in the norm.
    """

    swish = 0.0

    def forward(
        self,
        input: Tensor,  # [N, C, *]
        scale: Tensor | None = None,  # [N, C]
        shift: Tensor | None = None,  # [N, C]
        activation: str | None = None,
    ) -> Tensor:  # [N, C, *]
        return functional.group_norm_silu(
            input, self.num_groups, self.weight, self.bias, self.eps, scale, shift,
            "silu" if self.swish else activation,
        )  # fmt: skip


def is_norm(module: nn.Module | None) -> bool:
    return isinstance(module, nn.GroupNorm) and not isinstance(module, GroupNormSiLU)


def why_norm_unavailable(norm: nn.Module | None) -> str | None:
    if isinstance(norm, FusedGroupNorm):
        return None
    if not is_norm(norm):
        return f"{type(norm).__name__} is no GroupNorm"
    overridden = why_overridden(norm, nn.GroupNorm)
    if overridden is None:
        return None
    # guided-diffusion's norm computes in float32, as ours does; GLIDE's and Karlo's may also apply swish.
    if type(norm).__name__ == "GroupNorm32" and getattr(norm, "swish", 0.0) in (0.0, 1.0):
        return None
    return overridden


def is_silu(module: nn.Module | None) -> bool:
    """nn.SiLU, or guided-diffusion's class of the same name, written when torch had none."""
    return isinstance(module, nn.SiLU) or type(module).__name__ == "SiLU"


# ------------------------------------------------------------------------------------------------- sequential


class FusedSequential(Patched):
    """`nn.Sequential` in which a group norm and the SiLU after it are one op, also in its slices."""

    def forward(self, input: Tensor) -> Tensor:
        modules = list(self._modules.values())
        fused = False  # whether this module, a SiLU, was part of the op before
        for module, following in zip(modules, [*modules[1:], None], strict=True):
            if fused:
                fused = False
            elif isinstance(module, FusedGroupNorm) and not module.swish and _is_bare_silu(following):
                input, fused = module(input, activation="silu"), True
            else:
                input = module(input)
        return input


def _is_bare_silu(module: nn.Module | None) -> bool:
    """A SiLU without hooks, which a fused op would not call."""
    return is_silu(module) and not (module._forward_hooks or module._forward_pre_hooks)


def _has_pair(module: nn.Module) -> bool:
    """Whether a Sequential has a group norm that a SiLU follows."""
    if not isinstance(module, nn.Sequential):
        return False
    inside = list(module._modules.values())
    return any(is_norm(norm) and is_silu(act) for norm, act in zip(inside, inside[1:], strict=False))


def _why_sequential_unavailable(sequential: nn.Sequential) -> str | None:
    overridden = why_overridden(sequential, nn.Sequential)
    if overridden is not None:
        return overridden
    reasons = [why_norm_unavailable(module) for module in sequential if is_norm(module)]
    return reasons[0] if all(reasons) else None


# --------------------------------------------------------------------------------------------- residual block

_PARTS = ("in_layers", "emb_layers", "out_layers", "skip_connection")
# All names, global ones and attributes, that the published forwards use. A forward that uses more does more.
_NAMES = {
    *_PARTS, "use_scale_shift_norm", "updown", "up", "down", "h_upd", "x_upd", "th", "torch", "chunk", "type",
    "to", "dtype", "len", "shape", "F",
}  # fmt: skip


class FusedResBlock(Patched):
    """The block with FiLM (use_scale_shift_norm): its second norm, the FiLM and the SiLU are one op.

    The first norm, and both of a block without FiLM, are followed by SiLU in a Sequential and fused there.
    """

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return _residual(self, x, emb)


class FusedCheckpointedResBlock(Patched):
    """The same for a block whose forward only calls _forward through gradient checkpointing."""

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return _residual(self, x, emb)


def _residual(block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
    if getattr(block, "updown", False):
        h = block.h_upd(block.in_layers[:-1](x))
        x = block.x_upd(x)
        h = block.in_layers[-1](h)
    else:
        h = block.in_layers(x)
    scale, shift = block.emb_layers(emb).to(h.dtype).chunk(2, dim=1)
    h = block.out_layers[0](h, scale, shift, "silu")
    return block.skip_connection(x) + block.out_layers[2:](h)


def _inner_forward(block: nn.Module) -> types.FunctionType:
    return getattr(type(block), "_forward", type(block).forward)


def _is_film_block(block: nn.Module) -> bool:
    has_parts = all(isinstance(getattr(block, part, None), nn.Module) for part in _PARTS)
    return has_parts and bool(getattr(block, "use_scale_shift_norm", False))


def _is_checkpointed_film_block(block: nn.Module) -> bool:
    return _is_film_block(block) and hasattr(type(block), "_forward")


def _why_film_block_unavailable(block: nn.Module) -> str | None:
    forward = _inner_forward(block)
    if list(inspect.signature(forward).parameters)[1:] != ["x", "emb"]:
        return f"its forward takes {inspect.signature(forward)}, not (x, emb)"
    unknown = sorted(set(forward.__code__.co_names) - _NAMES)
    if unknown:
        return f"its forward uses {', '.join(unknown)}, which the published blocks do not"
    if not isinstance(block.out_layers, nn.Sequential) or len(block.out_layers) < 3:
        return "its out_layers are not a Sequential of norm, SiLU and more"
    norm, act = block.out_layers[0], block.out_layers[1]
    if getattr(norm, "swish", 0.0) or not is_silu(act):
        return f"its out_layers have no SiLU after the norm, but {type(act).__name__}"
    return why_norm_unavailable(norm)


RULES = (
    PatchRule("norms", FusedGroupNorm, is_norm, why_norm_unavailable),
    PatchRule("norms", FusedSequential, _has_pair, _why_sequential_unavailable),
    PatchRule("norms", FusedCheckpointedResBlock, _is_checkpointed_film_block, _why_film_block_unavailable),
    PatchRule("norms", FusedResBlock, _is_film_block, _why_film_block_unavailable),
)
