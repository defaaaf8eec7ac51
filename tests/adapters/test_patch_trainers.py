"""Patched models in trainers: DDP, FSDP2, checkpointing, compilation, averages, offloading.

Each test names the fault it would catch.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.cases import foreign_unets
from dalle2_fast.adapters._swap import Patched
from dalle2_fast.adapters.patch import patch, unpatch
from tests.support import loss_processes


def karlo(**changes) -> tuple[nn.Module, dict]:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    net = foreign_unets.build("karlo decoder", small=True, **changes).train()
    return net, foreign_unets.inputs("karlo decoder", net, 2, torch.Generator().manual_seed(1))


def gradients(net: nn.Module, given: dict) -> dict[str, torch.Tensor]:
    net.zero_grad()
    foreign_unets.run(net, given).square().mean().backward()
    return {name: value.grad.clone() for name, value in net.named_parameters()}


def assert_near(actual: dict, expected: dict) -> None:
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-6 * float(largest), msg=name)


def test_gradient_checkpointing():
    """Catches: a block that checkpointing calls with other arguments than the U-Net, or not at all."""
    net, given = karlo()
    expected = gradients(net, given)
    patch(net)
    net.enable_gradient_checkpointing()
    assert_near(gradients(net, given), expected)


def test_compile_makes_one_graph():
    """Catches: a patched block that breaks the graph; a cached mask or context that becomes part of it."""
    net, _ = karlo()
    patch(net)
    block = net.down_blocks[1].resnets[0]
    attention = net.down_blocks[1].attentions[0]
    generator = torch.Generator().manual_seed(2)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    mask = torch.zeros(2, 1, 5)
    mask[0, 0, 3:] = -10000.0
    x = randn(2, block.in_channels, 8, 8)
    calls = [
        (block, (x, randn(2, net.config.block_out_channels[0] * 4)), {}),
        (
            attention,
            (randn(2, attention.query_dim, 8, 8), randn(2, 5, net.config.cross_attention_dim), mask),
            {},
        ),
    ]
    for module, args, kwargs in calls:
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*args, **kwargs), module(*args, **kwargs))


def test_names_by_which_trainers_find_blocks():
    """Catches: class names that device maps, FSDP policies and saved configurations do not know."""
    net, _ = karlo()
    names = [type(module).__name__ for module in net.modules()]
    modules = [type(module).__module__ for module in net.modules()]
    patch(net)
    assert [type(module).__name__ for module in net.modules()] == names
    assert [type(module).__module__ for module in net.modules()] == modules


def test_processors_that_are_set_later_run():
    """Catches: a patch that ignores another processor; a reason that is not reported."""
    net, given = karlo()
    expected = foreign_unets.run(net, given)
    patch(net)
    net.set_default_attn_processor()
    calls = []
    attention = net.mid_block.attentions[0]
    plain = type(attention.processor)
    counting = type("Counting", (plain,), {"__call__": lambda *args, **kwargs: (
        calls.append(1), plain.__call__(*args, **kwargs))[1]})  # fmt: skip
    attention.processor = counting()
    torch.testing.assert_close(foreign_unets.run(net, given), expected, rtol=1e-4, atol=1e-5)
    assert calls == [1]
    unpatch(net)
    reasons = set(patch(net).skipped.values())
    known = "known are AttnProcessor2_0, AttnAddedKVProcessor2_0"
    assert reasons == {f"its processor is {name}; {known}" for name in ("AttnAddedKVProcessor", "Counting")}


def test_norms_or_attention_alone():
    """Catches: patched norms that need patched attention, or the reverse."""
    net, given = karlo()
    expected = foreign_unets.run(net, given)
    for options, kinds in (
        (dict(norms=False), {"Attention"}),
        (dict(attention=False), {"GroupNorm", "ResnetBlock2D"}),
    ):
        report = patch(net, **options)
        assert set(report.swapped.values()) == kinds
        torch.testing.assert_close(foreign_unets.run(net, given), expected, rtol=1e-4, atol=1e-5)
        unpatch(net)
    first, second = patch(net, norms=False), patch(net)
    assert second.already == first.swapped and set(second.swapped.values()) == {"GroupNorm", "ResnetBlock2D"}


def test_blocks_with_options():
    """Catches: resampling, output scale, dropout or skips of a block without FiLM that are left out."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers.models.resnet import ResnetBlock2D

    x, temb = (torch.randn(2, width, *size, generator=torch.Generator().manual_seed(width))
               for width, size in ((8, (6, 6)), (10, ())))  # fmt: skip
    shared = dict(in_channels=8, temb_channels=10, groups=4)
    for options in (
        dict(up=True),
        dict(down=True),
        dict(out_channels=12, output_scale_factor=2.0),
        dict(kernel="fir", up=True),
        dict(temb_channels=None),
        dict(skip_time_act=True, time_embedding_norm="scale_shift", groups_out=2),
        dict(dropout=0.5),
    ):
        block = ResnetBlock2D(**{**shared, **options})
        given = None if options.get("temb_channels", 1) is None else temb
        torch.manual_seed(3)
        expected = block(x, given)
        assert not patch(block).skipped
        torch.manual_seed(3)
        torch.testing.assert_close(block(x, given), expected, rtol=1e-5, atol=1e-5, msg=str(options))
    mish = ResnetBlock2D(**shared, non_linearity="mish")
    assert patch(mish).skipped == {"": "its activation is Mish, not SiLU"}
    with pytest.raises(ValueError, match="temb: expected a tensor because time_embedding_norm"):
        block = ResnetBlock2D(**{**shared, "temb_channels": None}, time_embedding_norm="scale_shift")
        patch(block)
        block(x, None)


def test_offloading_hooks_of_accelerate():
    """Catches: weights that are used without the hooks which load them to the device."""
    accelerate = pytest.importorskip("accelerate", reason="Accelerate is not installed")
    net, given = karlo()
    with torch.no_grad():
        expected = foreign_unets.run(net, given)
        patch(net)
        accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
        assert net.conv_norm_out.weight.device.type == "meta"
        torch.testing.assert_close(foreign_unets.run(net, given), expected, rtol=1e-4, atol=1e-5)


def test_averages_stay_patched():
    """Catches: an average whose modules are unpatched, or share weights with the model."""
    net, given = karlo()
    patch(net)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    before = {name: value.clone() for name, value in net.named_parameters()}
    with torch.no_grad():
        for value in net.parameters():
            value.add_(1.0)
    average.update_parameters(net)
    with torch.no_grad():
        for value in net.parameters():
            value.add_(1.0)
    average.update_parameters(net)
    for name, value in average.module.named_parameters():
        torch.testing.assert_close(value, before[name] + 1.5)  # the first update copies
    assert [type(one) for one in average.module.modules()] == [type(one) for one in net.modules()]


# ---------------------------------------------------------------------------------------------- two processes


def wrapped_gradients(rank: int, world_size: int, kind: str) -> dict:
    net, given = karlo()
    patch(net)
    half = {key: value[rank : rank + 1] for key, value in given.items()}
    if kind == "ddp":
        called = nn.parallel.DistributedDataParallel(net)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world_size,))
        for module in net.modules():
            if type(module).__name__ == "ResnetBlock2D":  # as policies choose blocks
                fully_shard(module, mesh=mesh)
        called = fully_shard(net, mesh=mesh)
    foreign_unets.run(called, half).square().mean().backward()
    whole = {name: value.grad.full_tensor() if hasattr(value.grad, "full_tensor") else value.grad
             for name, value in net.named_parameters()}  # fmt: skip
    assert any(isinstance(module, Patched) for module in net.modules())
    return {name: value.clone() for name, value in whole.items()}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes(kind, tmp_path):
    """Catches: weights that a wrapper does not see, sharded weights used without its hooks."""
    net, given = karlo()
    expected = gradients(net, given)
    for result in loss_processes.run(wrapped_gradients, 2, tmp_path, kind):
        assert not isinstance(result, str), result
        assert_near(result, expected)
