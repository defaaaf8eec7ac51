"""The kernels of group_norm_silu against float64, interpreted on the CPU (tiny) and compiled on a GPU (real).

A tiny slab always fits into registers; `path` shrinks the limits of _plan.py so that all kernels take part.
"""

from __future__ import annotations

import math

import pytest
import torch

from dalle2_fast import functional
from tests.support.norm_cases import BF16, FP16, FP32, NCHW, NDHWC, NHWC, PARAMETERS, compare, make, step

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def poison():
    """New memory is filled with NaN, so that an output that no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def plan(kernel_device):
    from dalle2_fast.kernels.group_norm_silu import _plan

    return _plan


@pytest.fixture
def path(plan, monkeypatch):
    """path("chunks") makes slabs of more than 16 elements take that path, in tiles of 64."""
    caches = (plan.resident_tiles, plan.forward_tiles, plan.chunk_tiles, plan.sum_tiles)

    def choose(name: str) -> None:
        if name == "resident":
            return
        for limit in ("RESIDENT_LANES", "RESIDENT_LANES_BACKWARD"):
            monkeypatch.setattr(plan, limit, 16)
        for lanes in ("FORWARD_LANES", "CHUNK_LANES", "LOOPED_LANES", "SUM_LANES"):
            monkeypatch.setattr(plan, lanes, 64)
        for programs in ("ROW_PROGRAMS", "COLUMN_PROGRAMS"):
            monkeypatch.setattr(plan, programs, 8)
        monkeypatch.setattr(plan, "processors", lambda device: 1)
        for most in ("FORWARD_MAX_LANES", "LOOPED_BYTES"):
            monkeypatch.setattr(plan, most, 1 << 30 if name == "looped" else 0)
        for cache in caches:
            cache.cache_clear()
        monkeypatch.setattr(plan.View, "int64_offsets", name == "chunks")

    yield choose
    for cache in caches:
        cache.cache_clear()


CASES = [
    # path, shape, groups, layout, dtype, given, activation
    ("resident", (2, 6, 5, 3), 2, NCHW, FP32, PARAMETERS, "silu"),  # odd channels a group, odd positions
    ("resident", (1, 20, 4, 4), 2, NCHW, FP16, PARAMETERS, None),
    ("resident", (2, 10, 3, 3), 5, NHWC, FP32, PARAMETERS, "silu"),
    ("resident", (1, 40, 4, 2), 8, NHWC, BF16, ("weight", "bias"), "silu"),
    ("resident", (2, 6, 7), 2, NCHW, FP32, (), "silu"),
    ("resident", (3, 12), 4, NCHW, FP32, ("bias", "scale"), "silu"),
    ("resident", (1, 6, 1, 1), 1, NCHW, FP32, ("shift",), None),
    ("resident", (1, 6, 3, 2, 2), 2, NDHWC, FP32, ("weight",), "silu"),
    ("resident", (1, 8, 3, 3), 8, NCHW, BF16, PARAMETERS, "silu"),  # one channel a group
    (
        "chunks",
        (2, 6, 9, 7),
        2,
        NCHW,
        FP32,
        PARAMETERS,
        "silu",
    ),  # a channel takes several tiles, the last cut
    ("chunks", (1, 12, 4, 4), 1, NCHW, FP16, PARAMETERS, "silu"),  # a tile takes several channels
    ("chunks", (1, 20, 5, 5), 4, NHWC, FP32, PARAMETERS, "silu"),  # a tile takes several groups
    (
        "chunks",
        (1, 80, 3, 3),
        1,
        NHWC,
        BF16,
        ("weight", "shift"),
        None,
    ),  # a group takes several tiles of channels
    ("looped", (1, 6, 9, 7), 2, NCHW, FP32, PARAMETERS, "silu"),
    ("looped", (1, 20, 5, 5), 4, NHWC, FP16, PARAMETERS, "silu"),
]


@pytest.mark.parametrize("path_name, shape, groups, layout, dtype, given, activation", CASES)
def test_close_to_truth(path, kernel_device, path_name, shape, groups, layout, dtype, given, activation):
    # Catches: any wrong formula, mask, stride or group border in any kernel; rounding in between.
    path(path_name)
    compare(
        shape, groups, dtype=dtype, device=kernel_device, layout=layout, given=given, activation=activation
    )


@pytest.mark.parametrize("layout", [NCHW, NHWC])
@pytest.mark.parametrize("width", [3, 18, 36, 50, 72])  # of 96, 576, 1152, 1600, 2304 channels in 32 groups
def test_widths_of_real_models(kernel_device, width, layout):
    # Catches: a group's width that is no power of two taken for one, with the real configuration.
    groups = 32 if layout == NHWC else 2  # in NCHW each has a program
    compare((1, groups * width, 3, 2), groups, dtype=FP32, device=kernel_device, layout=layout)


@pytest.mark.parametrize("path_name", ["resident", "looped", "chunks"])
@pytest.mark.parametrize("kind", ["channels_last", "transposed", "expanded", "cropped"])
def test_gradient_in_any_layout(path, kernel_device, path_name, kind):
    # Catches: dy read as if it lay like x.
    path(path_name)
    shape, groups = (1, 6, 4, 6), 2
    inputs = make(shape, kernel_device)
    dy = torch.randn(1, 6, 4, 6, generator=torch.Generator().manual_seed(1)).to(kernel_device)
    if kind == "expanded":
        dy = dy[:, :, :1, :1].expand(shape)
        same = dy.contiguous()
    else:
        same = dy
        dy = {
            "channels_last": lambda: dy.to(memory_format=torch.channels_last),
            "transposed": lambda: dy.transpose(2, 3).contiguous().transpose(2, 3),
            "cropped": lambda: torch.cat((dy, dy), 3)[..., :6],
        }[kind]()
    assert kind == "cropped" or dy.stride() != same.stride()
    results = step(inputs["x"], groups, inputs, dy), step(inputs["x"], groups, inputs, same, "reference")
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path_name", ["resident", "looped", "chunks"])
@pytest.mark.parametrize("layout", [NCHW, NHWC])
def test_survives_a_large_mean(path, kernel_device, path_name, layout):
    # Catches: E[x^2] - E[x]^2 (8 % off here), and float32 sums of numbers near 1e3 (3e-5 off).
    path(path_name)
    x = make((1, 8, 8, 8), kernel_device, mean=1e3, sigma=1.0, layout=layout)["x"]
    truth = functional.group_norm_silu(x.double(), 2)
    error = (functional.group_norm_silu(x, 2, impl="fused") - truth).norm() / truth.norm()
    assert error < 1e-6


@pytest.mark.parametrize("path_name", ["resident", "looped", "chunks"])
def test_an_outlier_first(path, kernel_device, path_name):
    # Catches: sums of squares about the first element, which is taken away from all others.
    path(path_name)
    x = make((1, 4, 8, 8), kernel_device, mean=1e3, sigma=1.0)["x"]
    x[:, ::2, 0, 0] = 0
    truth = functional.group_norm_silu(x.double(), 2)
    error = (functional.group_norm_silu(x, 2, impl="fused") - truth).norm() / truth.norm()
    assert error < 1e-4


def test_a_few_samples_at_a_time(path, kernel_device):
    # Catches: a slice of a tensor, of its sums or of its embedding that begins elsewhere (in `tune`).
    from benchmarks.timing.tune import changed
    from benchmarks.timing.variations import in_slices

    path("chunks")
    x, *given = make((3, 20, 5, 5), kernel_device, layout=NHWC).values()

    def norm():
        return functional.group_norm_silu(x, 4, *given[:2], 1e-5, *given[2:], impl="fused")

    expected = norm()
    with changed(in_slices(2)):
        assert torch.equal(norm(), expected)


def test_film_and_x_are_read_in_place(kernel_device):
    # Catches: strides of the batch or of the embedding taken for C * P and C.
    inputs = make((4, 6, 3, 3), kernel_device)
    x = inputs["x"][1::2]
    scale, shift = torch.cat((inputs["scale"], inputs["shift"]), 1)[1::2].chunk(2, 1)
    actual = functional.group_norm_silu(x, 2, scale=scale, shift=shift, impl="fused")
    expected = functional.group_norm_silu(x, 2, scale=scale, shift=shift, impl="reference")
    assert actual.is_contiguous() and not scale.is_contiguous()
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_any_shape_and_strides(path, kernel_device):
    # Catches: what the cases above did not think of. On a GPU each compiles kernels, for seconds.
    hypothesis = pytest.importorskip("hypothesis")
    numbers = hypothesis.strategies

    @hypothesis.settings(
        max_examples=3 if kernel_device == "cpu" else 15, deadline=None, database=None,
        phases=[hypothesis.Phase.generate],
    )  # fmt: skip
    @hypothesis.given(
        samples=numbers.integers(1, 2), groups=numbers.integers(1, 2), width=numbers.integers(1, 7),
        sides=numbers.lists(numbers.integers(1, 4), max_size=3), data=numbers.data(),
    )  # fmt: skip
    def check(samples, groups, width, sides, data):
        hypothesis.assume(width * math.prod(sides) >= 4)
        path(data.draw(numbers.sampled_from(["resident", "looped", "chunks"])))
        shape = (samples, groups * width, *sides)
        inputs = make(shape, kernel_device)
        x = inputs["x"]
        dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(kernel_device)
        order = [0, *data.draw(numbers.permutations(range(1, len(shape))))]
        inverse = sorted(range(len(shape)), key=order.__getitem__)
        x = x.permute(order).contiguous().permute(inverse)
        order = data.draw(numbers.permutations(range(len(shape))))
        inverse = sorted(range(len(shape)), key=order.__getitem__)
        dy = dy.permute(order).contiguous().permute(inverse)
        results = (step(x, groups, inputs, dy, impl) for impl in ("fused", "reference"))
        for actual, expected in zip(*results, strict=True):
            assert actual.stride() == expected.stride() or actual.numel() < 2 or 1 in shape
            # Few elements that happen to be nearly equal leave few digits of their differences.
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)

    check()


def test_no_second_derivative(kernel_device):
    # Catches: a second derivative that is silently zero.
    x = make((1, 2, 2, 2), kernel_device)["x"].requires_grad_()
    y = functional.group_norm_silu(x, 2, impl="fused").sum()
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(dx.sum(), x)


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0)])
def test_empty(kernel_device, shape):
    inputs = make(shape, kernel_device)
    y, *gradients = step(inputs["x"], 2, inputs, torch.empty(shape, device=kernel_device))
    assert y.shape == shape
    assert all(bool((gradient == 0).all()) for gradient in gradients)


FAKE = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("layout", [NCHW, NHWC])
def test_opcheck(kernel_device, layout):
    # Catches: a wrong schema, fakes that lie about shape, dtype or strides, an untraceable gradient.
    import dalle2_fast.kernels.group_norm_silu.forward  # noqa: F401

    inputs = {name: value.requires_grad_() for name, value in make((1, 4, 2, 2), kernel_device).items()}
    x = inputs["x"].detach().to(memory_format=layout).requires_grad_()
    arguments = (x, 2, inputs["weight"], inputs["bias"], 1e-5, inputs["scale"], inputs["shift"], True)
    tests = FAKE if layout == NHWC else None  # the others take long
    op = torch.ops.dalle2_fast.group_norm_silu.default
    torch.library.opcheck(op, arguments, **({"test_utils": tests} if tests else {}))
    given = [value if value is None else value.detach() for value in (x, *arguments[2:4], *arguments[5:7])]
    mean = torch.zeros(1, 2, device=kernel_device)
    dy, silu, wanted = given[0].clone(memory_format=NCHW), True, layout == NCHW  # dx lies as x does
    backward = torch.ops.dalle2_fast.group_norm_silu_backward.default
    torch.library.opcheck(backward, (dy, given[0], mean, mean + 1, *given[1:], silu, wanted), test_utils=FAKE)


def test_one_graph_for_every_batch(kernel_device):
    # Catches: a graph break, and a recompile when the batch changes.
    inputs = make((4, 4, 2, 2), kernel_device)
    compiles = []

    def backend(graph, example):
        compiles.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(x, scale):
        return functional.group_norm_silu(x, 2, inputs["weight"], scale=scale, impl="fused")

    for batch in (2, 3, 4):
        x, scale = inputs["x"][:batch].clone(), inputs["scale"][:batch].clone()
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(scale, 0)
        expected = functional.group_norm_silu(x, 2, inputs["weight"], scale=scale, impl="reference")
        torch.testing.assert_close(compiled(x, scale), expected, rtol=1e-5, atol=1e-5)
    assert len(compiles) == 1


def test_autocast_changes_nothing(kernel_device):
    x = make((1, 4, 3, 3), kernel_device)["x"]
    expected = functional.group_norm_silu(x, 2, impl="fused")
    with torch.autocast(kernel_device, torch.bfloat16):
        assert torch.equal(functional.group_norm_silu(x, 2, impl="fused"), expected)


# ---------------------------------------------------------------------------------------------- on a GPU only

GPU_CASES = [
    # Karlo's decoder and upsampler, GLIDE, Kandinsky 2.2, DALLE2-pytorch; odd ones
    ((8, 320, 64, 64), 32), ((8, 640, 32, 32), 32), ((8, 960, 16, 16), 32), ((8, 1280, 8, 8), 32),
    ((4, 640, 64, 64), 32), ((1, 320, 256, 256), 32), ((2, 640, 128, 128), 32), ((2, 192, 64, 64), 32),
    ((2, 384, 64, 64), 32), ((2, 1152, 32, 32), 32), ((2, 1536, 16, 16), 32), ((2, 2304, 32, 32), 32),
    ((2, 128, 64, 64), 8), ((3, 96, 31, 17), 32), ((2, 1600, 12, 12), 32), ((5, 21, 65, 65), 7),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [NCHW, NHWC])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("shape, groups", GPU_CASES)
def test_real_shapes_on_a_gpu(shape, groups, dtype, layout):
    compare(shape, groups, dtype=dtype, device="cuda", layout=layout)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [NCHW, NHWC])
@pytest.mark.parametrize("shape, groups", GPU_CASES)
def test_gradients_are_bitwise_repeatable(shape, groups, layout):
    # Catches: races and atomics.
    inputs = make(shape, "cuda", layout=layout)
    dy = torch.randn_like(inputs["x"])
    first = step(inputs["x"], groups, inputs, dy)
    for _ in range(3):
        again = step(inputs["x"], groups, inputs, dy)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.gpu
def test_large_mean_at_real_size():
    for shape in ((2, 320, 64, 64), (1, 320, 256, 256)):
        for layout in (NCHW, NHWC):
            x = make(shape, "cuda", mean=1e3, sigma=1.0, layout=layout)["x"]
            truth = functional.group_norm_silu(x.double(), 32)
            error = (functional.group_norm_silu(x, 32, impl="fused") - truth).norm() / truth.norm()
            assert error < 1e-5 and math.isfinite(error)


@pytest.mark.gpu
def test_captures_into_a_cuda_graph():
    # Catches: a wait for the device, an allocation outside of torch's pool.
    inputs = make((2, 320, 64, 64), "cuda")
    dy = torch.randn_like(inputs["x"])
    expected = step(inputs["x"], 32, inputs, dy)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = step(inputs["x"], 32, inputs, dy)
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
