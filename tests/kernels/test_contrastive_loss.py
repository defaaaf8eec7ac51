"""The contrastive losses of dalle2_fast._C on the CPU against the references in float64, and their ops.

`small_tiles` cuts few rows into many tiles. The text of the CUDA kernels runs in tests/csrc;
here OnCuda, which calls them, meets the CPU's epilogues in their place.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dalle2_fast import functional, reference
from tests.support.truth import assert_close_to_truth, outputs_and_gradients

_C = pytest.importorskip("dalle2_fast._C")

from dalle2_fast.kernels.contrastive import _tiles as tiles  # noqa: E402
from dalle2_fast.kernels.contrastive import loss as kernel  # noqa: E402

OPS = torch.ops.dalle2_fast
LOSSES = {
    "contrastive_loss": ("logit_scale",),
    "sigmoid_loss": ("logit_scale", "logit_bias"),
    "soft_contrastive_loss": ("logit_scale",),
}
each_loss = pytest.mark.parametrize("name", list(LOSSES))


def fused(name):
    return lambda **inputs: getattr(functional, name)(**inputs, impl="fused")


def plain(name):
    return lambda **inputs: getattr(functional, name)(**inputs, impl="reference")


def features(n, d, kind="unit"):
    generator = torch.Generator().manual_seed(n + d)
    image, text = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    if kind == "unit":
        image, text = F.normalize(image, dim=-1), F.normalize(0.4 * image + text, dim=-1)
    elif kind == "easy":  # every pair is found for sure: p - 1 is tiny
        image, text = F.normalize(image, dim=-1), F.normalize(image + 0.1 * text, dim=-1)
    elif kind == "equal":
        image = text = F.normalize(image[:1], dim=-1).expand(n, d).clone()
    elif kind == "opposite":
        image = F.normalize(image, dim=-1)
        text = -image
    elif kind == "far":  # all cosines near -0.9: exp(L - shift) is 0 in float32, at scale 100
        image = F.normalize(0.3 * image + 10 * torch.eye(1, d), dim=-1)
        text = F.normalize(0.3 * text - 10 * torch.eye(1, d), dim=-1)
    elif kind == "mixed":  # some rows and columns overflow, some do not
        image, text = (x * 10 ** torch.linspace(-2, 2, n, dtype=x.dtype)[:, None] for x in (image, text))
    elif kind == "huge":
        image, text = 300 * image, 300 * text
    return image, text


def inputs_of(name, n, d, kind="unit", scale=14.3, dtype=torch.float64):
    image, text = features(n, d, kind)
    # What a dtype cannot hold is not asked of it: its inputs are rounded before the truth is computed.
    inputs = {"image_features": image.to(dtype).double(), "text_features": text.to(dtype).double()}
    scalars = {"logit_scale": torch.tensor(scale), "logit_bias": torch.tensor(-3.0)}
    return inputs | {key: scalars[key].double() for key in LOSSES[name]}


def compare(name, inputs, dtype, slack=1e-6, yardsticks=None):
    """yardsticks: {"d ...": value}, by whose error that of ours is measured: for features in any case, for a
    scalar where plain torch's error is smaller."""
    # The scalars stay float32: one rounded to bfloat16 would be another question.
    inputs = {key: value.float() if value.dim() == 0 else value for key, value in inputs.items()}
    scalars = LOSSES[name]
    results = [
        outputs_and_gradients(function, inputs, one, keep_dtype=scalars)
        for function, one in ((fused(name), dtype), (plain(name), dtype), (plain(name), torch.float64))
    ]
    for key in results[2]:
        if dtype != torch.float64:
            assert results[0][key].dtype == results[1][key].dtype, key
    # A scalar's gradient is a sum that cancels to a 20,000th of its terms ("far", "easy"). How near plain
    # torch comes to it is luck with one order of the pairs, so its error is the largest of a few orders.
    for seed in range(4):
        order = torch.randperm(len(inputs["image_features"]), generator=torch.Generator().manual_seed(seed))
        shuffled = {key: value[order] if value.dim() else value for key, value in inputs.items()}
        again = outputs_and_gradients(plain(name), shuffled, dtype, keep_dtype=scalars)
        for key in (f"d {scalar}" for scalar in scalars):
            results[1][key] = max(results[1][key], again[key], key=lambda x: (x - results[2][key]).abs())
    for key, value in (yardsticks or {}).items():
        pair = (value, results[1][key]) if value.dim() == 0 else (value,)
        results[1][key] = max(pair, key=lambda x, key=key: float((x - results[2][key]).norm()))
    assert_close_to_truth(*results, slack=slack)


@pytest.fixture
def small_tiles(monkeypatch):
    """64 rows by at most 64 columns, both of several slabs."""
    monkeypatch.setattr(tiles.OnCpu, "most_columns", 64)
    monkeypatch.setattr(tiles.OnCpu, "budget", 1)


# ------------------------------------------------------------------------------------------ against the truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n, d, kind, scale", [
    (2, 1, "unit", 10.0), (7, 5, "unit", 1.0), (33, 17, "unit", 100.0), (601, 33, "unit", 14.3),
    (65, 64, "easy", 10.0), (40, 40, "opposite", 100.0), (40, 7, "far", 100.0),
    (50, 9, "mixed", 1.0), (50, 9, "mixed", 30.0),
])  # fmt: skip
@each_loss
def test_is_close_to_truth(name, n, d, kind, scale, dtype):
    # Catches: a wrong tail of a row, one direction only, sums out of range, p - 1 lost to a rounded lse.
    inputs = inputs_of(name, n, d, kind, scale, dtype)
    compare(name, inputs, dtype, slack=1e-5 if kind == "far" else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_loss
def test_features_that_are_all_equal(name, dtype):
    """Nothing can be told apart: gradients are 0 up to rounding, and have no size to be compared with."""
    inputs = inputs_of(name, 40, 7, "equal", 100.0, dtype)
    actual = {key: value.to(dtype) if value.dim() else value.float() for key, value in inputs.items()}
    actual = outputs_and_gradients(fused(name), actual, dtype, keep_dtype=LOSSES[name])
    torch.testing.assert_close(actual["output"].double(), plain(name)(**inputs), rtol=1e-6, atol=0)
    if name != "sigmoid_loss":
        assert all(value.abs().max() < 1e-4 for key, value in actual.items() if key != "output")


@pytest.mark.parametrize("kind, scale", [("unit", 100.0), ("mixed", 5.0), ("huge", 100.0)])
@each_loss
def test_float64(name, kind, scale):
    inputs = inputs_of(name, 37, 5, kind, scale)
    actual = outputs_and_gradients(fused(name), inputs, torch.float64)
    expected = outputs_and_gradients(plain(name), inputs, torch.float64)
    for key in expected:
        atol = 1e-12 * float(expected[key].abs().max())
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-9, atol=atol, msg=key)


@each_loss
def test_many_tiles(name, small_tiles):
    # Catches: a tile's own pairs at the wrong place, a column's sums of one tile, gradients not added up.
    for dtype in (torch.float32, torch.bfloat16):
        compare(name, inputs_of(name, 201, 19, "unit", 20.0, dtype), dtype)
        compare(name, inputs_of(name, 150, 19, "mixed", 3.0, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_one_pair(dtype):
    """A choice among one is free; its gradient is 0. The logits are near 100, where 4e-6 is a rounding."""
    image, text = (x.to(dtype).requires_grad_() for x in features(1, 8, "easy"))
    for name in ("contrastive_loss", "soft_contrastive_loss"):
        loss = fused(name)(image_features=image, text_features=text, logit_scale=99.7)
        gradient, _ = torch.autograd.grad(loss, (image, text))
        assert abs(loss) < 1e-6 and gradient.abs().max() < 1e-4, (name, loss, gradient)


@each_loss
def test_gradcheck(name):
    inputs = {key: value.requires_grad_() for key, value in inputs_of(name, 5, 3, scale=4.0).items()}
    if name != "soft_contrastive_loss":  # whose targets are held fixed: finite differences move them
        assert torch.autograd.gradcheck(lambda *values: fused(name)(**dict(zip(inputs, values, strict=True))),
                                        tuple(inputs.values()))  # fmt: skip
        return
    image, text, scale = inputs.values()
    targets = (scale * (image @ image.T + text @ text.T) / 2).softmax(1).detach()
    logits = scale * image @ text.T
    expected = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    actual = fused(name)(**inputs)
    torch.testing.assert_close(actual, expected)
    for one, other in zip(torch.autograd.grad(actual, [image, text, scale]),
                          torch.autograd.grad(expected, [image, text, scale]), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other)


def test_part_of_the_rows_against_all_texts(small_tiles):
    """What a process does: its own rows, the own text of row 0 at `first`."""
    image, text = (x.float() for x in features(170, 8))
    scale = torch.tensor(20.0)
    logits = (scale * image @ text.T).double()
    for begin, end in ((0, 40), (40, 140), (140, 170)):
        row_lse, column_lse, own = OPS.contrastive_lse(image[begin:end], text, scale, begin)
        mine = logits[begin:end]
        torch.testing.assert_close(row_lse, mine.logsumexp(1), rtol=0, atol=4e-6)
        torch.testing.assert_close(column_lse, mine.logsumexp(0), rtol=0, atol=4e-6)
        torch.testing.assert_close(own, logits.diagonal()[begin:end], rtol=0, atol=4e-6)

        everyone = logits.logsumexp(0)
        d_image, d_text, d_scale = OPS.contrastive_gradient(
            image[begin:end], text, scale, row_lse, everyone, begin, 0.3, 0.1, torch.tensor(2.0)
        )
        g = 0.3 * (mine - row_lse[:, None]).exp() + 0.1 * (mine - everyone).exp()
        g.diagonal(begin).sub_(0.4)
        torch.testing.assert_close(d_image.double(), 40 * g @ text.double(), rtol=0, atol=1e-4)
        torch.testing.assert_close(d_text.double(), 40 * g.T @ image[begin:end].double(), rtol=0, atol=1e-4)
        torch.testing.assert_close(d_scale.double(), 2 * (g * mine).sum() / 20, rtol=1e-4, atol=1e-4)

        for negatives_only in (False, True):
            z = -torch.ones_like(mine)
            if not negatives_only:
                z.diagonal(begin).fill_(1)
            loss, *_ = OPS.sigmoid_loss(
                image[begin:end], text, scale, torch.tensor(-1.0), begin, negatives_only
            )
            expected = -F.logsigmoid(z * (mine - 1)).sum() / (end - begin)
            torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def test_rows_whose_text_is_not_there():
    image, text = (x.float() for x in features(6, 4))
    _, _, own = OPS.contrastive_lse(image, text[:4], torch.tensor(3.0), 2)
    assert own.isfinite().tolist() == [True, True, False, False, False, False]


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@each_loss
def test_non_finite_features_never_give_a_finite_loss(name, bad, small_tiles):
    for where in ("image_features", "text_features"):
        for n in (1, 5, 150):
            inputs = {key: value.float() for key, value in inputs_of(name, n, 4).items()}
            inputs[where][n // 2, 1] = bad
            assert not fused(name)(**inputs).isfinite(), (where, n)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_scale_never_gives_a_finite_loss(bad):
    for name in LOSSES:
        inputs = {key: value.float() for key, value in inputs_of(name, 5, 4).items()}
        inputs["logit_scale"] = torch.tensor(bad)
        assert not fused(name)(**inputs).isfinite(), name


def test_scales_that_are_zero_negative_or_enormous():
    for scale in (0.0, -30.0, 3e4):
        compare("contrastive_loss", inputs_of("contrastive_loss", 33, 6, scale=scale), torch.float32, 1e-5)


def test_there_is_no_second_derivative():
    # Catches: the silent zero that a gradient kept from the forward pass would give.
    for name in LOSSES:
        inputs = {key: value.float().requires_grad_() for key, value in inputs_of(name, 5, 3).items()}
        loss = fused(name)(**inputs)
        with pytest.raises(NotImplementedError, match="one derivative"):
            (first,) = torch.autograd.grad(loss, inputs["image_features"], create_graph=True)
            torch.autograd.grad(first.sum(), inputs["text_features"])


# ---------------------------------------------------------------------------------- what callers may count on


@each_loss
def test_equal_calls_give_equal_bits(name):
    inputs = {key: value.float() for key, value in inputs_of(name, 300, 24).items()}
    first = outputs_and_gradients(fused(name), inputs, torch.float32)
    for _ in range(3):
        again = outputs_and_gradients(fused(name), inputs, torch.float32)
        assert all(torch.equal(first[key], again[key]) for key in first)


def epilogues(products, threads):
    """All four on a tile of these products, as one list of tensors."""
    rows, columns = products.shape
    row_lse, column_lse = (torch.full((size,), -math.inf, dtype=torch.float64) for size in (rows, columns))
    code = _C.DTYPES[str(products.dtype).removeprefix("torch.")]
    results = [row_lse, column_lse]

    def run(epilogue, *arguments):
        tile = tiles.workspace((rows, columns), products.dtype, products.device)
        tile.copy_(products)
        value = epilogue(*tiles._place(tile, 3), *arguments, threads)
        results.extend([tile, torch.tensor(value if value is not None else 0.0, dtype=torch.float64)])

    lse = row_lse.data_ptr(), column_lse.data_ptr()
    run(_C.cpu.lse_epilogue, code, 30.0, *lse)
    run(_C.cpu.gradient_epilogue, code, 30.0, *lse, 1.0, 0.5)
    run(_C.cpu.sigmoid_epilogue, code, 30.0, -2.0, True)
    alike = products.flip(0).contiguous()
    alike = tiles.workspace((rows, columns), products.dtype, products.device).copy_(alike)
    run(_C.cpu.soft_epilogue, alike.data_ptr(), code, 30.0, *lse, *lse, True)
    return results


def test_threads_change_nothing():
    products = torch.rand(257, 2600, generator=torch.Generator().manual_seed(0)) * 2 - 1
    products[::7] -= 8  # rows whose sums are out of range
    expected = epilogues(products, 1)
    for threads in (2, 3, 8):
        for one, other in zip(epilogues(products, threads), expected, strict=True):
            assert torch.equal(one, other)


def test_nothing_is_written_outside_the_columns():
    tile = torch.full((3, 16), math.nan)
    tile[:, :11] = 0.5
    row_lse, column_lse = (torch.full((size,), -math.inf, dtype=torch.float64) for size in (3, 13))
    place = tiles._place(tile[:, :11], 0)
    _C.cpu.lse_epilogue(*place, 0, 2.0, row_lse.data_ptr(), column_lse.data_ptr(), 1)
    torch.testing.assert_close(row_lse, torch.full((3,), math.log(11) + 1, dtype=torch.float64))
    assert column_lse[11:].isinf().all()
    _C.cpu.sigmoid_epilogue(*place, 0, 2.0, 0.0, True, 1)
    assert tile[:, :11].isfinite().all() and tile[:, 11:].isnan().all()


@each_loss
def test_rows_of_any_stride_and_mixed_dtypes(name):
    inputs = {key: value.float() for key, value in inputs_of(name, 30, 12).items()}
    expected = fused(name)(**inputs)
    for lay_out in (lambda x: x.T.contiguous().T, lambda x: torch.cat([x, x], 1)[:, :12],
                    lambda x: torch.stack([x, x], 2)[..., 0]):  # fmt: skip
        strided = inputs | {key: lay_out(inputs[key]) for key in ("image_features", "text_features")}
        torch.testing.assert_close(fused(name)(**strided), expected)
    rounded = inputs["text_features"].bfloat16()
    mixed = fused(name)(**(inputs | {"text_features": rounded}))
    torch.testing.assert_close(mixed, fused(name)(**(inputs | {"text_features": rounded.float()})))
    numbers = {key: float(inputs[key]) for key in LOSSES[name]}
    torch.testing.assert_close(fused(name)(**(inputs | numbers)), expected)


@each_loss
def test_autocast_changes_nothing(name):
    inputs = {key: value.float().requires_grad_() for key, value in inputs_of(name, 20, 12).items()}
    expected = torch.autograd.grad(fused(name)(**inputs), list(inputs.values()))
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(fused(name)(**inputs), list(inputs.values()))
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_a_bias_cancels_but_has_a_gradient():
    inputs = inputs_of("contrastive_loss", 9, 4)
    bias = torch.tensor([2.5], requires_grad=True)
    loss = fused("contrastive_loss")(**inputs, logit_bias=bias)
    assert loss == fused("contrastive_loss")(**inputs)
    assert torch.equal(torch.autograd.grad(loss, bias)[0], torch.zeros(1))


def test_auto_takes_the_reference_for_few_logits(monkeypatch):
    called = []
    monkeypatch.setattr(reference, "contrastive_loss", lambda *arguments: called.append(1))
    few, many = torch.eye(4), torch.eye(2048, 2)
    functional.contrastive_loss(few, few, 1.0)
    assert called == [1]
    functional.contrastive_loss(many, many, 1.0)
    assert called == [1]


# ---------------------------------------------------------------------------------------------- registration


def op_calls(device="cpu"):
    image, text = (x.float().to(device).requires_grad_() for x in features(5, 3))
    scale, bias = (torch.tensor(value, device=device, requires_grad=True) for value in (4.0, -2.0))
    plain_image, plain_text, plain_scale = (x.detach() for x in (image, text, scale))
    rows = torch.ones(5, dtype=torch.float64, device=device)
    return {
        OPS.contrastive_loss: (image, text, scale),
        OPS.sigmoid_loss: (image, text, scale, bias, 0, False),
        OPS.soft_contrastive_loss: (image, text, scale),
        OPS.contrastive_lse: (plain_image, plain_text, plain_scale, 0),
        OPS.contrastive_gradient: (
            plain_image, plain_text, plain_scale, rows, rows, 0, 0.1, 0.1, plain_scale
        ),
    }  # fmt: skip


@pytest.mark.parametrize("op", list(op_calls()), ids=str)
def test_opcheck(op):
    """Fails on a wrong schema, a fake that lies about shape or strides, or an untraceable gradient."""
    torch.library.opcheck(op.default, op_calls()[op])


@each_loss
def test_compiles_into_one_graph(name):
    inputs = {key: value.float().requires_grad_() for key, value in inputs_of(name, 20, 6).items()}
    compiled = torch.compile(lambda **kw: fused(name)(**kw) * 2, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(**inputs), list(inputs.values()))
    expected = torch.autograd.grad(fused(name)(**inputs) * 2, list(inputs.values()))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_tiles_cover_everything_once():
    for n, m in ((1, 1), (5, 70000), (70000, 5), (4096, 4096), (33000, 33000)):
        for budget in (1, 1 << 20, 32 << 20):
            rows, columns = shape = tiles.tile_shape(n, m, 4, budget, 8192)
            assert rows * columns * 4 <= max(budget, 64 * 4 * columns) + 64 * 4 * columns
            assert columns <= 8192
            covered = sum((c.rows.stop - c.rows.start) * (c.columns.stop - c.columns.start)
                          for c in tiles.cuts(n, m, 0, shape))  # fmt: skip
            assert covered == n * m


# ---------------------------------------------------------------------------------------- the GPU's launcher


class _Memory:
    """contrastive.h's cuda functions in terms of the CPU's: addresses are those of tensors kept here."""

    def __init__(self):
        self.kept = {}

    def tensor(self, address, shape, stride, dtype):
        import ctypes

        size = (shape[0] - 1) * stride + shape[1]
        buffer = (ctypes.c_char * (size * dtype.itemsize)).from_address(address)
        return torch.frombuffer(buffer, dtype=dtype).as_strided(shape, (stride, 1))

    def number(self, address, count=1, dtype=torch.float32):
        return self.tensor(address, (1, count), count, dtype)[0]

    def write(self, tile, gradient, stride, code, gain=1.0):
        dtype = {code: getattr(torch, name) for name, code in _C.DTYPES.items()}[code]
        self.tensor(gradient, tile.shape, stride, dtype).copy_(tile * gain)

    def workspace_bytes(self, rows, columns):
        return 256

    def lse_epilogue(self, *arguments):
        *place, factor, scale, row_lse, column_lse, _, _ = arguments
        _C.cpu.lse_epilogue(*place, 0, factor * float(self.number(scale)), row_lse, column_lse, 1)

    def own_products(self, image, image_stride, image_step, text, text_stride, text_step, n, d, code, own, _):
        assert (image_step, text_step) == (1, 1)
        dtype = {code: getattr(torch, name) for name, code in _C.DTYPES.items()}[code]
        image = self.tensor(image, (n, d), image_stride, dtype).float()
        self.number(own, n).copy_((image * self.tensor(text, (n, d), text_stride, dtype).float()).sum(1))

    def gradient_epilogue(self, *arguments):
        *place, scale, rows, columns, weight, other_weight, gradient, stride, code, sums, _, _ = arguments
        tile = self.tensor(place[0], place[2:4], place[1], torch.float32)
        value = _C.cpu.gradient_epilogue(*place, 0, float(self.number(scale)), rows, columns, weight,
                                         other_weight, 1)  # fmt: skip
        self.number(sums, 1, torch.float64).add_(value)
        self.write(tile, gradient, stride, code)

    def sigmoid_epilogue(self, *arguments):
        *place, scale, bias, gradient, stride, code, sums, _, _ = arguments
        tile = self.tensor(place[0], place[2:4], place[1], torch.float32)
        values = _C.cpu.sigmoid_epilogue(*place, 0, float(self.number(scale)), float(self.number(bias)),
                                         bool(gradient), 1)  # fmt: skip
        self.number(sums, 3, torch.float64).add_(torch.tensor(values, dtype=torch.float64))
        if gradient:
            self.write(tile, gradient, stride, code)

    def soft_epilogue(self, *arguments):
        *place, alike, scale, a, b, c, d, gradient, stride, code, sums, _, _ = arguments
        tile = self.tensor(place[0], place[2:4], place[1], torch.float32)
        values = _C.cpu.soft_epilogue(*place, alike, 0, float(self.number(scale)), a, b, c, d,
                                      bool(gradient), 1)  # fmt: skip
        self.number(sums, 2, torch.float64).add_(torch.tensor(values, dtype=torch.float64))
        if gradient:
            self.write(tile, gradient, stride, code)


@pytest.fixture
def launcher(monkeypatch):
    """OnCuda on CPU tensors."""
    native = SimpleNamespace(DTYPES=_C.DTYPES, cuda=_Memory())
    import dalle2_fast

    monkeypatch.setattr(dalle2_fast, "_C", native, raising=False)
    monkeypatch.setattr(kernel, "OnCpu", tiles.OnCuda)
    monkeypatch.setattr(tiles.OnCuda, "budget", 1)
    monkeypatch.setattr(tiles.OnCuda, "most_columns", 64)
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@each_loss
def test_the_gpus_launcher(name, dtype, launcher):
    """Order and number of arguments, workspaces, the gain of float16, gradients of their own dtype."""
    inputs = inputs_of(name, 150, 12, "unit", 20.0, dtype)
    inputs = {key: value.float() if value.dim() == 0 else value for key, value in inputs.items()}
    actual, truth = (outputs_and_gradients(function, inputs, one, keep_dtype=LOSSES[name])
                     for function, one in ((fused(name), dtype), (plain(name), torch.float64)))  # fmt: skip
    for key in truth:
        error = (actual[key].double() - truth[key]).norm() / truth[key].norm()
        assert error < (2e-6 if dtype == torch.float32 else 4e-3), (key, error)


def test_own_products_that_tensor_cores_cut_off(launcher, monkeypatch):
    """Catches a loss of the tiles' products, where sums are cut off, not rounded; here by far more."""
    inputs = inputs_of("contrastive_loss", 90, 64, "easy", 9.0, torch.bfloat16)
    exact = tiles.OnCuda.products

    def cut_off(self, cut):
        tile = exact(self, cut)
        own = self.image[cut.rows, None].float() @ self.text[cut.rows, :, None].float()
        mine = torch.arange(tile.shape[1]) == torch.arange(tile.shape[0])[:, None] + cut.own
        return tile.sub_(1e-3 * own[:, 0] * mine)

    monkeypatch.setattr(tiles.OnCuda, "products", cut_off)
    features = {key: value.bfloat16() if value.dim() else value.float() for key, value in inputs.items()}
    truth = plain("contrastive_loss")(**{key: value.float().double() for key, value in features.items()})
    actual = fused("contrastive_loss")(**features)
    torch.testing.assert_close(actual.double(), truth, rtol=3e-6, atol=0)


def test_a_loss_with_other_own_logits():
    logits = torch.randn(6, 6, dtype=torch.float64) * 3
    own = logits.diagonal()
    for exact in (own, own + 1e-5, own - 0.5):
        wanted = (logits - own.diag() + exact.diag()).logsumexp(1) - exact
        torch.testing.assert_close(kernel._above(logits.logsumexp(1), own, exact), wanted)
    far = torch.tensor([0.0, 0.0, 1e5, math.inf, math.nan], dtype=torch.float64)  # less own, which is 0
    nothing = torch.zeros(5, dtype=torch.float64)
    expected = torch.tensor([0.0, 0.0, 1e5, math.inf, math.nan], dtype=torch.float64)
    torch.testing.assert_close(kernel._above(far, nothing, nothing), expected, equal_nan=True)


@pytest.mark.parametrize("n", [300, 32768])
def test_tiles_hold_what_is_stored(n, launcher, monkeypatch):
    """Catches tiles as small as if products were stored beside G where Hopper's kernels make none, and tiles
    too large where they are stored after all: the kernel for the sigmoid loss knows no gain for float16."""
    import dalle2_fast

    hopper = SimpleNamespace(obstacle=lambda *_: None)
    monkeypatch.setattr(tiles.OnCuda, "budget", 256 << 20)
    monkeypatch.setattr(tiles.OnCuda, "most_columns", 16384)
    for dtype, loss, fused, bytes_each in (
        (torch.bfloat16, "clip", hopper, 2), (torch.float16, "clip", hopper, 2),
        (torch.bfloat16, "clip", None, 6),
        (torch.bfloat16, "sigmoid", hopper, 2), (torch.float16, "sigmoid", hopper, 6),
        (torch.bfloat16, "soft", hopper, 10),
    ):  # fmt: skip
        dalle2_fast._C.sm90 = fused
        on_cuda = tiles.OnCuda(*torch.zeros(2, n, 8, dtype=dtype), torch.tensor(1.0))
        on_cuda.over(loss, 0, gradients=True)
        rows, columns = on_cuda._shape
        most = (128 if bytes_each == 2 else 256) << 20
        assert rows * columns * bytes_each <= most, (dtype, loss)
        assert n == 300 or rows * columns * bytes_each > 0.75 * most, (dtype, loss)
