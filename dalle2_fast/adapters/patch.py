"""Fuse what a model of somebody else's already has: `patch(model)` and back, `unpatch(model)`.

report = dalle2_fast.patch(unet)       # print(report): what was swapped, what was not and why
dalle2_fast.unpatch(unet)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from dalle2_fast.adapters import _swap, dalle2_pytorch_blocks, diffusers_blocks, norm_blocks

_COVERS = (*dalle2_pytorch_blocks.COVERS, *diffusers_blocks.COVERS, *norm_blocks.COVERS)


@dataclass
class PatchReport:
    """What `patch` did. Keys are the names of `named_modules`; for a pipeline, component.name.

    swapped: name -> class of what runs fused since this call; already: since an earlier one.
    skipped: name -> why a module of a known kind was left as it was.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    already: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} modules swapped{_counted(self.swapped)}"]
        if self.already:
            lines.append(f"{len(self.already)} swapped before{_counted(self.already)}")
        if self.skipped:
            lines.append(f"{len(self.skipped)} left as they were:")
            by_reason = defaultdict(list)
            for name, reason in self.skipped.items():
                by_reason[reason].append(name)
            for reason, names in by_reason.items():
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                lines.append(f"  {', '.join(names[:3])}{more}: {reason}")
        if not (self.swapped or self.already or self.skipped):
            lines.append("the model has no module of a known kind")
        return "\n".join(lines)


def _counted(found: dict[str, str]) -> str:
    counts = defaultdict(int)
    for kind in found.values():
        counts[kind] += 1
    return ": " + ", ".join(f"{count} {kind}" for kind, count in counts.items()) if counts else ""


def patch(model: nn.Module, *, norms: bool = True, attention: bool = True) -> PatchReport:
    """Let the blocks of a model call the fused ops, by swapping their classes in place.

    A module keeps its identity, weights, state_dict keys and hooks; its class becomes a subclass of what it
    was, with the same name, so isinstance, EMA copies, FSDP and DDP wrapping, checkpointing, pickling (where
    dalle2_fast can be imported) and saving work as before. Calling it again changes nothing more. On a CPU
    the ops run their plain reference: the same numbers, no speed.

    Known are: GroupNorm; Sequentials with GroupNorm and SiLU in a row; diffusers' ResnetBlock2D and Attention
    (with AttnProcessor2_0 or AttnAddedKVProcessor2_0), in U-Nets, autoencoders and pipelines;
    DALLE2-pytorch's Block, Attention and CrossAttention; ResBlocks with FiLM of guided-diffusion's family.

    Autocast: a group norm does its maths in float32 and returns the dtype of its input, where torch's
    autocast returns float32; attention runs in autocast's dtype. Both round once.

    Args:
        model: a module, changed in place (also when compiled or wrapped); or a diffusers pipeline: all its
            modules, and every call of it projects its context once (see `adapters.context_cache`).
        norms: swap norms and the blocks around them.
        attention: swap attention.

    Raises:
        TypeError, ValueError: model is neither, or nothing is asked for.
    """
    for name, value in (("norms", norms), ("attention", attention)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    if not (norms or attention):
        raise ValueError("norms, attention: expected at least one of them, got neither")
    wanted = {"norms": norms, "attention": attention}
    report = PatchReport()
    found = []
    for name, module in _modules(model):
        if isinstance(module, _swap.Patched):
            report.already[name] = type(module).__name__
            continue
        cover = next((cover for cover in _COVERS if cover.is_one(module)), None)
        if cover is None:
            continue
        reason = cover.obstacle(module) if wanted[cover.option] else f"{cover.option}=False"
        if reason is None:
            found.append((name, module, cover))
        else:
            report.skipped[name] = reason
    for name, module, cover in found:  # after every obstacle was looked for: blocks depend on their norms
        report.swapped[name] = type(module).__name__
        _swap.swap(module, cover.mixin)
    if attention and diffusers_blocks.is_pipeline(model) and not _swap.is_patched(model):
        _swap.swap(model, diffusers_blocks.CachingPipeline)
    return report


def unpatch(model: nn.Module) -> int:
    """Give every module of a model, or pipeline, the class back that it had before `patch`.

    Returns:
        The number of modules that were restored; 0 where nothing was patched.

    Raises:
        TypeError: model is neither a module nor a pipeline.
        RuntimeError: a module got yet another class after it was patched.
    """
    modules = list(_modules(model))
    for name, module in modules:  # all or nothing
        _swap.check_restorable(name, module)
    if not isinstance(model, nn.Module):
        _swap.restore(model)
    return sum(_swap.restore(module) for _, module in modules)


def _modules(model: object) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(model, nn.Module):
        yield from model.named_modules()
    elif diffusers_blocks.is_pipeline(model):
        for component, module in model.components.items():
            if isinstance(module, nn.Module):
                for name, one in module.named_modules():
                    yield f"{component}.{name}" if name else component, one
    else:
        raise TypeError(
            f"model: expected a torch.nn.Module or a diffusers pipeline, got {type(model).__name__}"
        )
