"""Patched U-Nets that run the kernels, interpreted, under what trainers put around a network.

On a CPU a patched network takes the references, and so do the other tests of `patch`. Here it takes the
kernels, as on a GPU. Each test names the fault it would catch.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks.cases import foreign_unets
from dalle2_fast.adapters.patch import patch
from dalle2_fast.ops import _dispatch
from tests.support import loss_processes

pytest.importorskip("diffusers", reason="diffusers is not installed")
_TWO_LEVELS = dict(block_out_channels=(8, 16), sample_size=4, norm_num_groups=1)  # few programs
_BLOCKS = {
    "karlo decoder": dict(
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    ),
    "stable diffusion 1.5": dict(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
}


def take_kernels(setattr) -> None:
    """Let "auto" take the kernels where they can run, and raise where they cannot."""
    choose = _dispatch.use_reference

    def use_reference(impl, *tensors, **options):
        return choose("fused" if impl == "auto" else impl, *tensors, **options)

    setattr(_dispatch, "use_reference", use_reference)


@pytest.fixture(autouse=True)
def on_the_cpu(kernel_device):
    if kernel_device == "cuda":
        pytest.skip("on a GPU a patched network takes the kernels")


def make(name: str) -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    net = foreign_unets.build(name, small=True, **_TWO_LEVELS, **_BLOCKS[name]).train()
    return net, foreign_unets.inputs(name, net, 2, torch.Generator().manual_seed(1))


def results(net: nn.Module, given: dict) -> dict[str, torch.Tensor]:
    """The output and the gradients."""
    net.zero_grad()
    out = foreign_unets.run(net, given)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype))
    return {"output": out.detach()} | {name: value.grad.clone() for name, value in net.named_parameters()}


def assert_near(actual: dict, expected: dict) -> None:
    largest = max(value.abs().max() for value in expected.values())
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=2e-6 * float(largest), msg=name)


def test_gradient_checkpointing_of_a_copy(monkeypatch):
    """Catches: a block whose kernel gets other arguments than its reference; saved tensors that are unpacked
    twice under checkpointing; a copy without kernels, or with the weights of the original."""
    net, given = make("karlo decoder")
    expected = results(net, given)
    patch(net)
    take_kernels(monkeypatch.setattr)
    twin = copy.deepcopy(net)
    twin.enable_gradient_checkpointing()
    with torch.no_grad():
        for value in net.parameters():
            value.zero_()
    assert_near(results(twin, given), expected)


def test_autocast(monkeypatch):
    """Catches: a kernel that gets two dtypes, or a result that is rounded more often than without the patch.
    Float16 also takes attention's short form."""
    net, given = make("stable diffusion 1.5")
    truth = results(net, given)
    with torch.autocast("cpu", torch.float16):
        plain = results(net, given)
        patch(net)
        take_kernels(monkeypatch.setattr)
        ours = results(net, given)
    plain, ours = (
        {key: (found[key].float() - value).norm() for key, value in truth.items()} for found in (plain, ours)
    )
    assert ours.pop("output") <= 1.5 * plain.pop("output")
    # The error of a single weight is random, the root mean square of all is not.
    assert torch.stack(list(ours.values())).norm() <= 1.5 * torch.stack(list(plain.values())).norm()


def test_compiled_blocks(monkeypatch):
    """Catches: a kernel that breaks the graph, or whose fake has another shape or dtype than the result."""
    net, _ = make("karlo decoder")
    patch(net)
    take_kernels(monkeypatch.setattr)
    block, attention = net.down_blocks[1].resnets[0], net.down_blocks[1].attentions[0]
    mask = torch.zeros(2, 1, 5)
    mask[0, 0, 3:] = -10000.0
    embedding = torch.randn(2, net.config.block_out_channels[0] * 4)
    context = torch.randn(2, 5, net.config.cross_attention_dim)
    for module, width, others in (
        (block, block.in_channels, (embedding,)),
        (attention, attention.query_dim, (context, mask)),
    ):
        x = torch.randn(2, width, 4, 4, requires_grad=True)
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        out, expected = (function(x, *others) for function in (compiled, module))
        torch.testing.assert_close(out, expected)
        gradient, truth = (torch.autograd.grad(value.square().sum(), x)[0] for value in (out, expected))
        torch.testing.assert_close(gradient, truth)


def test_a_row_that_masks_every_key(monkeypatch):
    """Catches: zeros for a caption without tokens, where diffusers attends to all keys alike."""
    net, given = make("stable diffusion 1.5")
    mask = torch.ones(given["encoder_hidden_states"].shape[:2], dtype=torch.int64)
    mask[0], mask[1, 2:] = 0, 0
    with torch.no_grad():
        masked, unmasked = net(**given, encoder_attention_mask=mask).sample, net(**given).sample
        patch(net)
        take_kernels(monkeypatch.setattr)
        actual = net(**given, encoder_attention_mask=mask).sample
    torch.testing.assert_close(actual, torch.stack([unmasked[0], masked[1]]), rtol=1e-4, atol=1e-5)


def gradients_of_a_rank(rank: int, world_size: int) -> dict:
    take_kernels(setattr)
    net, given = make("karlo decoder")
    patch(net)
    half = {key: value[rank : rank + 1] for key, value in given.items()}
    wrapped = nn.parallel.DistributedDataParallel(net)
    foreign_unets.run(wrapped, half).square().mean().backward()
    return {name: value.grad.clone() for name, value in net.named_parameters()}


def test_two_processes(tmp_path):
    """Catches: gradients of a kernel that DDP does not average."""
    net, given = make("karlo decoder")
    foreign_unets.run(net, given).square().mean().backward()
    expected = {name: value.grad for name, value in net.named_parameters()}
    for result in loss_processes.run(gradients_of_a_rank, 2, tmp_path):
        assert not isinstance(result, str), result
        assert_near(result, expected)
