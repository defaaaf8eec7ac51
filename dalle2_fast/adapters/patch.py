"""Fuse the blocks of another library's model in place, `patch(model)`, and undo it, `unpatch(model)`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from dalle2_fast.adapters import _swap, norm_blocks
from dalle2_fast.adapters.dalle2_pytorch import blocks as dalle2_pytorch_blocks
from dalle2_fast.adapters.diffusers import blocks as diffusers_blocks

_RULES = (*dalle2_pytorch_blocks.RULES, *diffusers_blocks.RULES, *norm_blocks.RULES)


@dataclass
class PatchReport:
    """What `patch` did; `print` shows it.

    The keys are the names of `named_modules`; for a pipeline they begin with the name of the component.

    Args:
        swapped: name -> class of a module that runs fused since this call.
        already: name -> class of a module that an earlier call has patched.
        skipped: name -> why a module of a known kind was left unchanged.

    Example:
        >>> print(PatchReport(swapped={"mid.norm": "GroupNorm"}, skipped={"out": "norms=False"}))
        1 modules swapped: 1 GroupNorm
        1 left as they were:
          out: norms=False
    """

    swapped: dict[str, str] = field(default_factory=dict)
    already: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} modules swapped{_counts(self.swapped)}"]
        if self.already:
            lines.append(f"{len(self.already)} swapped before{_counts(self.already)}")
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


def _counts(found: dict[str, str]) -> str:
    counts = Counter(found.values())
    return ": " + ", ".join(f"{count} {kind}" for kind, count in counts.items()) if counts else ""


def patch(model: nn.Module, *, norms: bool = True, attention: bool = True) -> PatchReport:
    """Let the blocks of a model call the fused ops, by replacing their classes in place.

    A module stays the same object with the same weights, state_dict keys and hooks. Its class becomes a
    subclass of its original class with the same name, so isinstance, EMA copies, FSDP and DDP wrapping,
    checkpointing, pickling (where dalle2_fast can be imported) and saving work as before. A second call
    changes nothing more. On a CPU the ops run their plain reference, which gives the same numbers without a
    speed-up.

    Known kinds: GroupNorm; Sequentials in which SiLU follows GroupNorm; diffusers' ResnetBlock2D and
    Attention (with AttnProcessor2_0 or AttnAddedKVProcessor2_0) in U-Nets, autoencoders and pipelines;
    DALLE2-pytorch's Block, Attention and CrossAttention; ResBlocks with FiLM of guided-diffusion's family.

    Autocast: a group norm computes in float32 and returns the dtype of its input, where torch's autocast
    returns float32; attention runs in autocast's dtype. Both round once.

    Args:
        model: a module, also a compiled or wrapped one, which is changed in place; or a diffusers pipeline,
            of which all modules are changed, and every call of which projects its context once (see
            `adapters.context_cache`).
        norms: patch norms and the blocks around them.
        attention: patch attention.

    Returns:
        A `PatchReport`: the patched modules, and the reason for each module that was left unchanged.

    Raises:
        TypeError: model is neither a module nor a pipeline; norms or attention is not a bool.
        ValueError: norms and attention are both False.

    Example:
        >>> import dalle2_fast
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU())
        >>> print(dalle2_fast.patch(net))
        2 modules swapped: 1 Sequential, 1 GroupNorm
        >>> type(net[1]).__name__, isinstance(net[1], nn.GroupNorm)
        ('GroupNorm', True)
        >>> dalle2_fast.unpatch(net)
        2
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
        rule = next((rule for rule in _RULES if rule.matches(module)), None)
        if rule is None:
            continue
        reason = rule.why_unavailable(module) if wanted[rule.option] else f"{rule.option}=False"
        if reason is None:
            found.append((name, module, rule))
        else:
            report.skipped[name] = reason
    for name, module, rule in found:  # now that all reasons are known: those of a block depend on its norms
        report.swapped[name] = type(module).__name__
        _swap.swap(module, rule.mixin)
    if attention and diffusers_blocks.is_pipeline(model) and not _swap.is_patched(model):
        _swap.swap(model, diffusers_blocks.CachingPipeline)
    return report


def unpatch(model: nn.Module) -> int:
    """Give every module of a model or pipeline the class back that it had before `patch`.

    Args:
        model: a module or a diffusers pipeline, patched or not.

    Returns:
        The number of modules that were restored; 0 if nothing was patched.

    Raises:
        TypeError: model is neither a module nor a pipeline.
        RuntimeError: the class of a module was changed again after it was patched; then no module is
            restored.

    Example:
        >>> unpatch(nn.GroupNorm(2, 8))
        0
    """
    modules = list(_modules(model))
    for name, module in modules:
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
