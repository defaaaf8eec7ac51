"""`patch` and `unpatch` on plain torch and blocks like guided-diffusion's. Each test names its fault."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dalle2_fast
from dalle2_fast import functional
from dalle2_fast.adapters.patch import patch, unpatch
from tests.support.truth import assert_close_to_truth

# --------------------------------------------------------------------- the block of guided-diffusion's family


class GroupNorm32(nn.GroupNorm):
    """guided-diffusion's norm in float32 (here float64 stays float64), with GLIDE's swish."""

    def __init__(self, groups: int, channels: int, swish: float = 0.0) -> None:
        super().__init__(groups, channels)
        self.swish = swish

    def forward(self, x):
        y = super().forward(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
        return nn.functional.silu(y) if self.swish == 1.0 else y


class ResBlock(nn.Module):
    """A copy of the published block: in, embedding and out layers, a skip, optional FiLM and resampling."""

    def __init__(self, channels=8, out_channels=12, emb=6, film=True, updown=False, swish=False) -> None:
        super().__init__()
        norm = partial(GroupNorm32, 2)
        first = [norm(channels, 1.0), nn.Identity()] if swish else [norm(channels), nn.SiLU()]
        self.in_layers = nn.Sequential(*first, nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, out_channels * (2 if film else 1)))
        self.out_layers = nn.Sequential(
            norm(out_channels),
            nn.SiLU(),
            nn.Dropout(0.0),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        self.skip_connection = nn.Conv2d(channels, out_channels, 1)
        self.use_scale_shift_norm, self.updown = film, updown
        self.h_upd = self.x_upd = nn.Upsample(scale_factor=2)

    def forward(self, x, emb):
        if self.updown:
            in_rest, in_conv = self.in_layers[:-1], self.in_layers[-1]
            h = in_conv(self.h_upd(in_rest(x)))
            x = self.x_upd(x)
        else:
            h = self.in_layers(x)
        emb_out = self.emb_layers(emb).type(h.dtype)
        while len(emb_out.shape) < len(h.shape):
            emb_out = emb_out[..., None]
        if self.use_scale_shift_norm:
            out_norm, out_rest = self.out_layers[0], self.out_layers[1:]
            scale, shift = torch.chunk(emb_out, 2, dim=1)
            h = out_rest(out_norm(h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb_out)
        return self.skip_connection(x) + h


class CheckpointedResBlock(ResBlock):
    def forward(self, x, emb):
        return checkpoint(self._forward, x, emb, use_reentrant=False)

    _forward = ResBlock.forward


class OtherResBlock(ResBlock):
    """A block that does more than the published one."""

    def forward(self, x, emb):
        return self.rescale(super().forward(x, emb))

    def rescale(self, x):
        return 2 * x


BLOCKS = {
    "film": ResBlock,
    "no film": partial(ResBlock, film=False),
    "up": partial(ResBlock, updown=True),
    "swish": partial(ResBlock, swish=True),
    "checkpointed": CheckpointedResBlock,
    "checkpointed up": partial(CheckpointedResBlock, updown=True),
}


def block_results(block: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Output, and the gradients of all parameters and inputs."""
    block = copy.deepcopy(block).to(dtype)
    for module in block.modules():
        if isinstance(module, nn.GroupNorm) and dtype == torch.bfloat16:
            module.float()
    generator = torch.Generator().manual_seed(0)
    x, emb = (torch.randn(shape, generator=generator).bfloat16().to(dtype).requires_grad_()
              for shape in ((3, 8, 5, 5), (3, 6)))  # fmt: skip
    out = block(x, emb)
    out.backward(torch.randn(out.shape, generator=generator).to(dtype))
    named = dict(block.named_parameters())
    assert all(value.grad is not None for value in named.values())
    grads = {name: value.grad for name, value in named.items()}
    return {"out": out.detach(), "dx": x.grad, "demb": emb.grad, **grads}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_residual_blocks_agree(name, dtype):
    """Catches: a wrong order of FiLM, SiLU, resampling; weights that get no gradient."""
    torch.manual_seed(0)
    block = BLOCKS[name]()
    for value in block.parameters():
        value.data = value.data.bfloat16().float()  # the same weights in every dtype
    truth = block_results(block, torch.float64)
    plain = block_results(block, dtype)
    patch(block)
    assert_close_to_truth(block_results(block, dtype), plain, truth)


def test_which_residual_blocks_are_swapped(monkeypatch):
    """Catches: a block that does more than the published one, but is patched; norms that are not fused."""
    blocks = nn.ModuleDict({
        "film": ResBlock(), "checkpointed": CheckpointedResBlock(), "plain": ResBlock(film=False),
        "other": OtherResBlock(),
    })  # fmt: skip
    report = patch(blocks)
    assert report.swapped["film"] == "ResBlock" and report.swapped["checkpointed"] == "CheckpointedResBlock"
    assert "plain" not in report.swapped and report.swapped["plain.out_layers"] == "Sequential"
    assert (
        report.skipped["other"]
        == "its forward uses forward, rescale, super, which the published blocks do not"
    )
    assert calls_of(monkeypatch, blocks["film"]) == [(False, "silu"), (True, "silu")]
    assert calls_of(monkeypatch, blocks["plain"]) == [(False, "silu"), (False, "silu")]
    assert calls_of(monkeypatch, blocks["other"]) == [(False, "silu"), (False, None)]


def calls_of(monkeypatch, block: nn.Module) -> list[tuple[bool, str | None]]:
    """(with FiLM, activation) of each norm that runs fused."""
    found, plain = [], functional.group_norm_silu

    def record(x, groups, weight, bias, eps, scale, shift, activation):
        found.append((scale is not None, activation))
        return plain(x, groups, weight, bias, eps, scale, shift, activation)

    monkeypatch.setattr(functional, "group_norm_silu", record)
    block(torch.ones(1, 8, 4, 4), torch.ones(1, 6))
    monkeypatch.undo()
    return found


# ------------------------------------------------------------------------------------------------ plain torch


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(4, 8), nn.GELU(),
        nn.GroupNorm(4, 8),
    )  # fmt: skip


def test_a_sequential_agrees_and_fuses_pairs_only(monkeypatch):
    """Catches: SiLU applied twice or never; GELU treated as SiLU; a slice in which the pair is not fused."""
    net, x = small(), torch.randn(2, 3, 8, 8)
    expected, part = net(x), net[1:3](net[0](x))
    patch(net)
    torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(net[1:3](net[0](x)), part)
    found = []
    plain = functional.group_norm_silu
    monkeypatch.setattr(functional, "group_norm_silu", lambda *args: found.append(args[-1]) or plain(*args))
    net(x)
    assert found == ["silu", None, None]


def test_hooks_see_what_they_saw():
    """Catches: a norm or an activation whose hooks (FSDP, offloading) are not called."""
    net, x = small(), torch.randn(2, 3, 8, 8)
    patch(net)
    seen = []
    net[1].register_forward_hook(lambda *_: seen.append("norm"))
    net(x)
    assert seen == ["norm"]
    net[2].register_forward_hook(
        lambda module, args, out: seen.append(torch.equal(out, args[0].sigmoid() * args[0]))
    )
    net[2].register_forward_pre_hook(lambda *_: seen.append("before"))
    expected = unhooked = net(x)
    assert seen[1:3] == ["norm", "before"] and len(seen) == 4
    torch.testing.assert_close(unhooked, expected)


def test_the_report_and_back():
    """Catches: a class, a key or an object that differs after unpatch; a second patch that stacks."""
    net = small()
    net.mine = type("MyNorm", (nn.GroupNorm,), {"forward": lambda self, x: x})(2, 8)
    before = {name: (module, type(module)) for name, module in net.named_modules()}
    keys = list(net.state_dict())
    report = dalle2_fast.patch(net)
    assert report.swapped == {"": "Sequential", "1": "GroupNorm", "4": "GroupNorm", "6": "GroupNorm"}
    assert report.skipped == {
        "mine": "test_the_report_and_back.<locals>.MyNorm overrides forward"
    } or (report.skipped == {"mine": "MyNorm overrides forward"})
    text = str(report)
    assert text.startswith("4 modules swapped: 1 Sequential, 3 GroupNorm\n1 left as they were:\n  mine: ")
    assert "GroupNorm[dalle2_fast](2, 8" in repr(net) and type(net[1]).__name__ == "GroupNorm"
    assert type(net[1]).__module__ == "torch.nn.modules.normalization"
    again = patch(net)
    assert not again.swapped and again.already == report.swapped
    assert isinstance(net[1], nn.GroupNorm) and list(net.state_dict()) == keys
    assert unpatch(net) == 4 and unpatch(net) == 0
    assert {name: (module, type(module)) for name, module in net.named_modules()} == before
    assert not any("original_class" in vars(module) for module in net.modules())
    assert "known kind" in str(patch(nn.Linear(1, 1)))


def test_norms_only_attention_only():
    """Catches: an option that is ignored."""
    report = patch(small(), norms=False)
    assert not report.swapped and set(report.skipped.values()) == {"norms=False"}


def test_copies_and_pickles_stay_patched():
    """Catches: an EMA copy or a spawned process that cannot find the class, or gets the unpatched one."""
    net, x = small(), torch.randn(2, 3, 8, 8)
    patch(net)
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    average = torch.optim.swa_utils.AveragedModel(net)
    copies = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(buffer, weights_only=False),
              pickle.loads(pickle.dumps(net, protocol=0)), average.module]  # fmt: skip
    for other in copies:
        assert [type(module) for module in other.modules()] == [type(module) for module in net.modules()]
        assert torch.equal(other(x), net(x)) and other[1].weight is not net[1].weight
        assert unpatch(other) == 4 and type(other[1]) is nn.GroupNorm


def test_compile_makes_one_graph():
    """Catches: a patched block that breaks the graph."""
    for block in (small(), ResBlock(), ResBlock(updown=True)):
        patch(block)
        args = (torch.randn(2, 3, 8, 8),) if isinstance(block, nn.Sequential) else (
            torch.randn(2, 8, 5, 5), torch.randn(2, 6))  # fmt: skip
        torch._dynamo.reset()
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*args), block(*args))


def test_autocast_rounds_once():
    """Catches: a norm that does not return the dtype of its input, as the docstring says."""
    net = small()[:3]
    patch(net)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(torch.randn(2, 3, 8, 8))
    assert out.dtype == torch.bfloat16 and net[1].weight.dtype == torch.float32


def test_our_own_norms_are_not_theirs():
    """Catches: our fused module reported as one that cannot be patched."""
    report = patch(dalle2_fast.GroupNormSiLU(2, 8))
    assert not report.swapped and not report.skipped


def test_wrong_arguments_are_named():
    with pytest.raises(
        TypeError, match="model: expected a torch.nn.Module or a diffusers pipeline, got dict"
    ):
        patch({})
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        unpatch(None)
    with pytest.raises(TypeError, match="norms: expected a bool, got int"):
        patch(small(), norms=1)
    with pytest.raises(ValueError, match="norms, attention: expected at least one"):
        patch(small(), norms=False, attention=False)
    net = small()
    patch(net)
    net[1].__class__ = type("Sharded", (type(net[1]),), {})
    with pytest.raises(RuntimeError, match="model: 1 got another class, Sharded, after it was patched"):
        unpatch(net)
    assert type(net[4]) is not nn.GroupNorm  # all or nothing
