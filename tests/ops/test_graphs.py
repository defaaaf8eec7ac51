"""The graphs around the fused ops: the models have no unfused op, and no graph breaks or recompiles."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dalle2_fast import Decoder, Upsampler, functional
from dalle2_fast.models.unet.model import AttentionBlock, UNet
from dalle2_fast.modules import GroupNormSiLU
from dalle2_fast.ops import _dispatch


class CountOps(TorchDispatchMode):
    """Counts the ops that run, and SiLUs by the rank of what they run on."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op._schema.name
        if name.startswith("aten::silu"):
            name += f" of rank {args[0].dim()}"
        self.counts[name] += 1
        return op(*args, **(kwargs or {}))


@pytest.fixture
def fused(monkeypatch, kernel_device):
    """Every op takes the fused path, on every device and for every dtype."""

    assert _dispatch.load_kernels(torch.device(kernel_device)) is None
    monkeypatch.setattr(_dispatch, "use_reference", lambda *_, **__: False)


UNFUSED = ("native_group_norm", "native_layer_norm", "var_mean", "_softmax", "attention")


def unfused(counts: Counter) -> list[str]:
    """Ops that one of the kernels should have replaced."""
    ours = [name for name in counts if name.startswith("aten::") and any(word in name for word in UNFUSED)]
    return ours + [name for name in counts if name.startswith("aten::silu") and not name.endswith("rank 2")]


def count_ops(net: UNet, batch: int, size: int, cache=None, labels=None) -> Counter:
    sample = torch.empty(batch, net.in_channels, size, size)
    with torch.no_grad(), CountOps() as mode:
        net(sample, torch.empty(batch), cache, labels)
    return mode.counts


def modules(net: torch.nn.Module, kind: type) -> int:
    return sum(isinstance(module, kind) for module in net.modules())


def test_nothing_of_the_decoders_graph_is_unfused(fused):
    with FakeTensorMode():  # shapes only: the default decoder has 900 million parameters
        net = Decoder().unet
        mask = torch.empty(2, 81, dtype=torch.bool)
        cache = net.encode_context(torch.empty(2, 81, net.cross_dim), mask)
        labels = torch.empty(2, net.class_embed_dim or net.embed_dim)
        counts = count_ops(net, 2, 64, cache, labels)
    assert unfused(counts) == []
    # Karlo's decoder: 95 norms, 22 of them before an attention.
    assert counts["dalle2_fast::group_norm_silu"] == modules(net, GroupNormSiLU) == 95
    assert counts["dalle2_fast::cross_attention"] == modules(net, AttentionBlock) == 22
    assert counts["aten::cat"] <= 1 + 16  # one of cosine and sine, and the skips: no keys are concatenated
    assert counts["aten::silu of rank 2"] == 2  # of the embedding


def test_nothing_of_the_upsamplers_graph_is_unfused(fused):
    with FakeTensorMode():
        net = Upsampler().unet
        counts = count_ops(net, 1, 256)
    assert unfused(counts) == []
    assert counts["dalle2_fast::group_norm_silu"] == modules(net, GroupNormSiLU) == 73


def test_the_count_sees_what_is_unfused():
    x = torch.ones(1, 4, 2, 2)
    with CountOps() as mode:
        torch.nn.functional.silu(functional.group_norm_silu(x, 2, activation=None, impl="reference"))
        functional.cross_attention(x, x, x, impl="reference")
    found = unfused(mode.counts)
    assert "aten::native_group_norm" in found and "aten::silu of rank 4" in found
    assert any("attention" in name or "softmax" in name for name in found)


def test_the_fused_decoder_draws_the_references_image(fused, monkeypatch, kernel_device):
    # From embedding to image through every kernel. Catches: a fault that shows only when ops are combined.
    torch.manual_seed(0)
    unet = dict(
        in_channels=3, out_channels=3, channels=(16,), layers_per_block=1, attention_levels=(0,), head_dim=8,
        cross_dim=8, num_groups=2,
    )  # fmt: skip
    decoder = Decoder(unet, image_size=4, image_embed_dim=8, text_embed_dim=8, text_encoding_dim=8,
                      variance="fixed_small")  # fmt: skip
    for parameter in decoder.parameters():  # an untrained U-Net returns zeros
        torch.nn.init.normal_(parameter, std=0.2)
    decoder.to(kernel_device)

    def draw():
        embed = torch.ones(1, 8, device=kernel_device)
        return decoder.sample(embed, seeds=torch.tensor([3]), steps=2, guidance=2.0)

    with CountOps() as mode:
        image = draw()
    for op in ("group_norm_silu", "cross_attention", "diffusion_step"):
        assert mode.counts[f"dalle2_fast::{op}"] > 0
    monkeypatch.setattr(_dispatch, "use_reference", lambda *_, **__: True)
    torch.testing.assert_close(image, draw(), atol=1e-4, rtol=0)


# ----------------------------------------------------------------------------------- torch.compile: one graph


def varied(device: str) -> dict:
    """op -> function of (batch, timestep, guidance) whose tensors all change."""

    def full(*shape, value=0.5):
        return torch.full(shape, value, device=device)

    def scalar(value, dtype):
        return torch.tensor(value, dtype=dtype, device=device)

    def norm(batch, step, guidance):
        return full(batch, 4, 4, 4), full(batch, 4), full(batch, 4)

    def attention(batch, step, guidance):
        mask = torch.ones(batch, 3, dtype=torch.bool, device=device)
        return full(batch, 1, 4, 32), full(batch, 1, 3, 32), mask

    def noising(batch, step, guidance):
        seeds = torch.arange(batch, device=device)
        return full(batch, 3, 4, 4), full(batch), seeds, scalar(step, torch.int64)

    def stepping(batch, step, guidance):
        return (
            full(batch, 3, 4, 4),
            full(2 * batch, 6, 4, 4),
            full(5, 8),
            scalar(step, torch.int64),
            torch.arange(batch, device=device),
            scalar(guidance, torch.float32),
        )

    return {
        "group_norm_silu": (
            norm,
            lambda x, scale, shift: functional.group_norm_silu(
                x, 2, scale=scale, shift=shift, impl="fused"
            ),
        ),
        "cross_attention": (
            attention,
            lambda q, k, mask: functional.cross_attention(q, k, k, mask, q, q, impl="fused"),
        ),
        "add_noise": (
            noising,
            lambda x, alpha, seeds, step: functional.add_noise(
                x, alpha, alpha, seeds=seeds, step=step, impl="fused"
            ),
        ),
        "diffusion_step": (
            stepping,
            lambda x, output, table, step, seeds, guidance: functional.diffusion_step(
                x, output, table, step, seeds=seeds, guidance=guidance, learned_range=True, impl="fused"
            ),
        ),
    }


@pytest.mark.parametrize("op", list(varied("cpu")))
def test_one_graph_for_every_batch_timestep_and_guidance(op, kernel_device):
    """Catches a graph break (fullgraph), a batch, step or guidance that became part of the graph
    (recompiles), and a fake that lies (aot_eager runs on it)."""
    arguments, function = varied(kernel_device)[op]
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for batch, step, guidance in ((7, 1, 3.0), (3, 1, 3.0), (3, 4, 3.0), (2, 0, 7.5)):
        inputs = arguments(batch, step, guidance)
        for tensor in inputs:
            if tensor.dim() > 0 and len(tensor) in (batch, 2 * batch):
                torch._dynamo.mark_dynamic(tensor, 0)
        torch.testing.assert_close(compiled(*inputs), function(*inputs))
    assert counter.frame_count == 1
    assert counter.op_count >= 1


# ------------------------------------------------------------------------------ one error, fused or reference


def failing(device: str) -> dict:
    x = torch.ones(2, 4, 3, 3, device=device)
    q = torch.ones(2, 2, 3, 32, device=device)
    one, seeds = torch.ones(2, device=device), torch.arange(2, device=device)
    table = torch.ones(3, 8, device=device)
    mask = torch.ones(2, 5, dtype=torch.bool, device=device)

    def norm(**changed):
        return lambda impl: functional.group_norm_silu(**{"x": x, "num_groups": 2, **changed}, impl=impl)

    def attention(**changed):
        tensors = {"q": q, "context_k": q, "context_v": q, **changed}
        return lambda impl: functional.cross_attention(**tensors, impl=impl)

    def noising(**changed):
        given = {"x0": x, "alpha": one, "sigma": one, **changed}
        return lambda impl: functional.add_noise(**given, impl=impl)

    def stepping(**changed):
        given = {"x": x, "model_output": x, "table": table, "step": 0, **changed}
        return lambda impl: functional.diffusion_step(**given, impl=impl)

    return {
        "norm rank": norm(x=one),
        "norm groups": norm(num_groups=3),
        "norm weight": norm(weight=torch.ones(5, device=device)),
        "norm device": norm(bias=torch.ones(4, device="meta")),
        "attention rank": attention(q=q[0]),
        "attention width": attention(context_k=q[..., :31]),
        "attention dtype": attention(context_v=q.half()),
        "attention mask": attention(context_mask=mask),
        "noise twice": noising(noise=x, seeds=seeds),
        "noise seeds": noising(seeds=seeds[:1]),
        "step rows": stepping(guidance=2.0),
        "step guidance": stepping(guidance=float("nan"), model_output=torch.cat([x, x])),
        "step range": stepping(step=3),
        "step device": stepping(table=table.to("meta")),
    }


@pytest.mark.parametrize("case", list(failing("cpu")))
def test_fused_and_reference_raise_the_same(case, kernel_device):
    raised = []
    for impl in ("reference", "fused", "auto"):
        with pytest.raises((TypeError, ValueError)) as info:
            failing(kernel_device)[case](impl)
        raised.append((info.type, str(info.value)))
    assert len(set(raised)) == 1, json.dumps([text for _, text in raised], indent=1)
