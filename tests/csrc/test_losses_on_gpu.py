"""The contrastive losses on a GPU: against float64, at the required accuracy, bit by bit, in a CUDA graph.

The same files have run on the CPU (test_emulated_*.py, test_sm90.py); what only a GPU can show is here. On a
Hopper GPU each test runs both Hopper's kernels and those for any GPU, elsewhere only the latter.

Plain torch is no yardstick for two of the errors:
- At 16 bits G, the gradient of the logits, is rounded to the features' dtype, which tensor cores multiply;
  plain torch multiplies in float32. Where the sum over G cancels, that rounding shows: 1.5 to 4.6 times plain
  torch's error for few or easy or far pairs, measured on an H200. The features' gradients are compared with
  those of a G rounded in this way and multiplied exactly.
- A scalar's gradient is a sum that cancels to a 20,000th of its terms; it may be off by 3e-7 of the sum of
  their magnitudes (two roundings of a float32), however close plain torch comes by chance.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

_C = pytest.importorskip("dalle2_fast._C")

from tests.support.losses.fused_cases import LOSSES, compare, fused, inputs_of  # noqa: E402

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
each_loss = pytest.mark.parametrize("name", list(LOSSES))


@pytest.fixture(autouse=True, params=["Hopper's", "any GPU's"])
def kernels(request, monkeypatch):
    if not hasattr(_C, "cuda"):
        pytest.skip("dalle2_fast._C was built without CUDA")
    if request.param == "any GPU's":
        monkeypatch.setattr(_C, "sm90", None, raising=False)
    elif torch.cuda.get_device_capability()[0] != 9 or not hasattr(_C, "sm90"):
        pytest.skip("needs a Hopper GPU and a build for 90a")


def on_gpu(name, n, d, kind="unit", scale=14.3, dtype=torch.float32):
    return {key: value.to(DEVICE) for key, value in inputs_of(name, n, d, kind, scale, dtype).items()}


def leaves_of(name, inputs, dtype):
    """Features of dtype, scalars of float32, all with requires_grad."""
    return {key: (value.to(dtype) if value.dim() else value.float()).requires_grad_()
            for key, value in inputs.items()}  # fmt: skip


def loss_and_gradients(name, leaves):
    loss = fused(name)(**leaves)
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


def yardsticks(name, inputs, dtype):
    """The gradients described above, for `compare`, which weighs them as outputs_and_gradients does."""
    image, text, scale = (inputs[key] for key in ("image_features", "text_features", "logit_scale"))
    products, n = image @ text.T, len(image)
    logits, is_positive = scale * products, torch.eye(n, dtype=torch.float64, device=DEVICE)
    if name == "sigmoid_loss":
        gradient, share = (logits + inputs["logit_bias"]).sigmoid() - is_positive, 1 / n
        size = gradient.abs()
    else:
        row_log_p, column_log_p = logits - logits.logsumexp(1, keepdim=True), logits - logits.logsumexp(0)
        gradient, share = row_log_p.exp() + column_log_p.exp() - 2 * is_positive, 0.5 / n
        # By expm1, which keeps the precision of a small result.
        gradient[is_positive > 0] = (row_log_p.expm1() + column_log_p.expm1()).diagonal()
        size = gradient.abs()
    if name == "soft_contrastive_loss":
        p = (scale * (image @ image.T + text @ text.T) / 2).softmax(1)
        gradient = row_log_p.exp() + column_log_p.exp() - p - p.T
        size = row_log_p.exp() + column_log_p.exp() + p + p.T  # these are differences
    weight = torch.randn((), generator=torch.Generator().manual_seed(7)).bfloat16()  # as there
    share = share * weight.double().to(DEVICE)
    sums = {"d logit_scale": products, "d logit_bias": torch.ones_like(products)}
    # Off by 2e-7: compare allows 1.5 times a yardstick's error.
    found = {key: share * ((gradient * factor).sum() + 2e-7 * (size * factor).abs().sum())
             for key, factor in sums.items() if key[2:] in inputs}  # fmt: skip
    if dtype != torch.float32:
        scaling = 1024 if dtype == torch.float16 else 1  # as in kernels/contrastive/_cuda.py
        # With soft targets G is a difference, taken in float32, of parts much larger than it.
        rounded = (scaling * (gradient + 2e-7 * size)).to(dtype).double() / scaling
        found["d image_features"] = (share * scale * rounded @ text).to(dtype)
        found["d text_features"] = (share * scale * rounded.T @ image).to(dtype)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, d, kind, scale", [
    (2, 8, "unit", 10.0), (33, 17, "unit", 100.0), (601, 33, "unit", 14.3),
    (257, 64, "easy", 10.0), (1000, 512, "unit", 100.0), (3001, 200, "unit", 50.0),
    # The sums about one shift do not serve here: cosines near -1 at scale 100, features of any length.
    (300, 40, "opposite", 100.0), (700, 16, "far", 100.0), (500, 24, "mixed", 30.0),
])  # fmt: skip
@each_loss
def test_is_close_to_truth(name, n, d, kind, scale, dtype):
    # Catches: an edge of a tile or of the width, a race between copy and product, sums out of range.
    inputs = on_gpu(name, n, d, kind, scale, dtype)
    compare(name, inputs, dtype, 1e-5 if kind == "far" else 3e-6, yardsticks(name, inputs, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_pair_has_nothing_to_learn(dtype):
    results = loss_and_gradients("contrastive_loss", leaves_of(
        "contrastive_loss", on_gpu("contrastive_loss", 1, 3, "unit", 10.0, dtype), dtype))  # fmt: skip
    assert all(bool((result.abs() < 1e-5).all()) for result in results)


def relative(actual: torch.Tensor, truth: torch.Tensor) -> float:
    return float((actual.double() - truth).norm() / truth.norm())


def test_at_scale_100_the_error_is_half_of_autocasts():
    """Catches logits rounded to bfloat16, which is where autocast's error comes from."""
    inputs = on_gpu("contrastive_loss", 8192, 512, "unit", 100.0, torch.bfloat16)
    truth_leaves = {key: value.double().requires_grad_() for key, value in inputs.items()}
    image, text, scale = truth_leaves.values()
    logits = scale * image @ text.T
    labels = torch.arange(len(image), device=DEVICE)
    value = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    truth = [value.detach(), *torch.autograd.grad(value, [image, text, scale])]

    plain = {key: value.float().requires_grad_() for key, value in inputs.items()}
    with torch.autocast(DEVICE, torch.bfloat16):
        by_row = plain["logit_scale"] * plain["image_features"] @ plain["text_features"].T
        by_column = plain["logit_scale"] * plain["text_features"] @ plain["image_features"].T
        amp = (F.cross_entropy(by_row, labels) + F.cross_entropy(by_column, labels)) / 2
    eager = [amp.detach(), *torch.autograd.grad(amp, list(plain.values()))]
    ours = loss_and_gradients("contrastive_loss", leaves_of("contrastive_loss", inputs, torch.bfloat16))
    assert abs(float(ours[0]) - float(truth[0])) <= 1e-5 * abs(float(truth[0]))
    for index in (1, 2):
        error = relative(ours[index], truth[index])
        assert error <= 3e-3 and error <= relative(eager[index], truth[index]) / 2


@each_loss
def test_twenty_calls_give_equal_bits(name):
    leaves = leaves_of(name, on_gpu(name, 4097, 264, "unit", 30.0, torch.bfloat16), torch.bfloat16)
    first = loss_and_gradients(name, leaves)
    for _ in range(19):
        assert all(map(torch.equal, first, loss_and_gradients(name, leaves)))


@each_loss
def test_a_captured_graph_computes_with_new_features(name):
    """Catches a wait for the device, memory that a replay no longer owns, a number frozen into the graph, and
    the re-summing about maxima left out or kept in by what was true at the capture."""
    leaves = leaves_of(name, on_gpu(name, 1500, 96, "unit", 20.0, torch.bfloat16), torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            loss_and_gradients(name, leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradients(name, leaves)
    for kind, scale in (("easy", 7.0), ("far", 100.0), ("unit", 60.0)):
        new = leaves_of(name, on_gpu(name, 1500, 96, kind, scale, torch.bfloat16), torch.bfloat16)
        with torch.no_grad():
            for key, leaf in leaves.items():
                leaf.copy_(new[key])
        graph.replay()
        expected = loss_and_gradients(name, new)
        assert all(map(torch.equal, captured, expected)), f"{kind}, {scale}"


@each_loss
def test_the_current_stream_is_used(name):
    """Catches a launch on the default stream: it would read features that are not there yet."""
    side = torch.cuda.Stream()
    leaves = leaves_of(name, on_gpu(name, 2048, 128), torch.bfloat16)
    expected = loss_and_gradients(name, leaves)
    late = {key: torch.zeros_like(leaf) for key, leaf in leaves.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late = {key: (value + leaves[key].detach()).requires_grad_() for key, value in late.items()}
        actual = loss_and_gradients(name, late)
    side.synchronize()
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@each_loss
def test_non_finite_features_never_give_a_finite_loss(name, bad):
    inputs = on_gpu(name, 300, 64, dtype=torch.bfloat16)
    for key in ("image_features", "text_features"):
        spoilt = leaves_of(name, inputs | {key: inputs[key].clone()}, torch.bfloat16)
        with torch.no_grad():
            spoilt[key][123, 5] = bad
        assert not fused(name)(**spoilt).isfinite()


@pytest.mark.parametrize("n, d, limit", [(32768, 512, 0.6e9), (32768, 1024, 0.6e9), (131072, 768, 1.6e9)])
def test_memory_is_bounded(n, d, limit):
    """Of all beyond the features, gradients included: the logits of 131072 pairs would take 69 GB."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    leaves = [F.normalize(torch.randn(n, d, device=DEVICE, generator=generator), dim=1).bfloat16()
              .requires_grad_() for _ in range(2)]  # fmt: skip
    scale = torch.tensor(14.3, device=DEVICE, requires_grad=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = fused("contrastive_loss")(image_features=leaves[0], text_features=leaves[1], logit_scale=scale)
    gradients = torch.autograd.grad(loss, [*leaves, scale])
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= limit
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
