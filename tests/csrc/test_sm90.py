"""csrc/contrastive_sm90.cu without a Hopper GPU: its text runs on modelled hardware (tests/csrc/cuda_on_cpu/
sm90_hardware.h: mbarriers, bulk copies with the 128-byte swizzle, wgmma's fragments), and nvcc, where it is,
says what it compiles to."""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
MEBIBYTE = 1 << 20
DTYPES = {torch.float16: 2, torch.bfloat16: 3}
# (copies land late, products are computed late, threads run in descending order)
EARLY_COPIES, LATE_COPIES = (False, True, False), (True, False, True)


class Matrices(ctypes.Structure):
    _fields_ = [("image", c_void_p), ("text", c_void_p)] + [
        (name, c_int64) for name in ("image_stride", "text_stride", "rows", "columns", "width", "own")
    ]
    _fields_ += [("dtype", c_int)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    built = tmp_path_factory.mktemp("sm90") / "library.so"
    includes = ["-I", ROOT / "tests" / "csrc" / "cuda_on_cpu", "-I", ROOT / "csrc"]  # in this order
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
    source = ROOT / "tests" / "csrc" / "cuda_on_cpu" / "sm90_library.cpp"
    subprocess.run([compiler, *flags, *includes, source, "-o", built], check=True)
    library = ctypes.CDLL(str(built))
    library.configure.argtypes = [c_int, c_bool, c_bool, c_bool, c_int64]
    library.set_device_obstacle.argtypes = [c_char_p]
    library.workspace_bytes.argtypes = [c_int64] * 3
    library.workspace_bytes.restype = c_int64
    matrices = ctypes.POINTER(Matrices)
    library.obstacle.argtypes = [matrices]
    library.lse.argtypes = [matrices] + [c_void_p] * 5
    products = [matrices] + [c_void_p] * 3
    library.gradient.argtypes = products + [c_float] * 2 + [c_void_p, c_int64] + [c_void_p] * 2
    library.sigmoid.argtypes = products + [c_int64] + [c_void_p] * 2
    for name in ("obstacle", "lse", "gradient", "sigmoid"):
        getattr(library, name).restype = c_char_p
    return library


class Kernels:
    """The calls of csrc/contrastive.h on torch's tensors; workspaces and outputs begin as NaN."""

    def __init__(self, library, image: Tensor, text: Tensor, own: int) -> None:
        self.library, self.image, self.text = library, image, text
        self.matrices = Matrices(
            image.data_ptr(),
            text.data_ptr(),
            image.stride(0),
            text.stride(0),
            image.shape[0],
            text.shape[0],
            image.shape[1],
            own,
            DTYPES[image.dtype],
        )
        rows, columns = self.shape = image.shape[0], text.shape[0]
        size = library.workspace_bytes(rows, columns, image.shape[1])
        self.workspace = torch.full((size // 4 + 4,), math.nan)
        self.guard = self.workspace[-3:]  # beyond the size: has to stay NaN
        assert library.obstacle(self.matrices) is None

    def run(self, name: str, *arguments) -> None:
        pointers = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
        failure = getattr(self.library, name)(self.matrices, *pointers, self.workspace.data_ptr())
        assert failure is None, failure
        assert bool(self.guard.isnan().all()), "the workspace is too small"

    def lse(self, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        row_lse, column_lse = (torch.full((size,), math.nan, dtype=torch.float64) for size in self.shape)
        own_products = torch.full((self.shape[0],), 7.0)
        self.run("lse", torch.tensor(scale), row_lse, column_lse, own_products)
        self.summed_twice = bool(self.workspace.view(torch.int32)[0])  # the flag, at its beginning
        return row_lse, column_lse, own_products

    def gradient(self, scale: float, row_lse, column_lse, row_weight, column_weight) -> tuple[Tensor, float]:
        gradient, sums = self._output(), torch.ones(1, dtype=torch.float64)
        arguments = torch.tensor(scale), row_lse, column_lse, row_weight, column_weight
        self.run("gradient", *arguments, gradient, gradient.stride(0), sums)
        return self._written(gradient), sums.item() - 1

    def sigmoid(self, scale: float, bias: float, with_gradient: bool = True) -> tuple[Tensor | None, Tensor]:
        gradient, sums = self._output(), torch.ones(3, dtype=torch.float64)
        place = gradient if with_gradient else None
        self.run("sigmoid", torch.tensor(scale), torch.tensor(bias), place, gradient.stride(0), sums)
        return self._written(gradient) if with_gradient else None, sums - 1

    def _output(self) -> Tensor:
        rows, columns = self.shape
        return torch.full((rows, columns // 8 * 8 + 16), math.nan, dtype=self.image.dtype)

    def _written(self, gradient: Tensor) -> Tensor:
        columns = self.shape[1]
        assert bool(gradient[:, columns:].isnan().all()), "written past the last column"
        return gradient[:, :columns]


def features(rows: int, columns: int, width: int, dtype=torch.bfloat16, *, like: float = 0.3, own: int = 0):
    """Unit vectors, rows 16 bytes apart or more; own pairs have cosines of about `like` and above."""
    generator = torch.Generator().manual_seed(rows * columns + width)
    text = torch.nn.functional.normalize(torch.randn(columns, width, generator=generator), dim=1)
    image = torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=1)
    mine = torch.arange(rows) + own
    has = (mine >= 0) & (mine < columns)
    image[has] = torch.nn.functional.normalize(image[has] + like / (1 - like) * text[mine[has]], dim=1)
    padded = (width + 7) // 8 * 8 + 8
    # What lies between the rows must not be read.
    stores = [torch.full((count, padded), math.nan, dtype=dtype) for count in (rows, columns)]
    image, text = (store[:, :width].copy_(value) for store, value in zip(stores, (image, text), strict=True))
    return image, text


def truth_of(image: Tensor, text: Tensor, own: int):
    """Products in float64, and where a row has its own text."""
    products = image.double() @ text.double().T
    is_own = torch.arange(text.shape[0]) == torch.arange(image.shape[0])[:, None] + own
    return products, is_own


def assert_near(actual: Tensor, truth: Tensor, relative: float, *, floor: float = 0.0) -> None:
    error = (actual.double() - truth).norm() / truth.norm()
    assert error <= relative, f"relative error {error:.2e} > {relative:.0e}"
    worst = ((actual.double() - truth).abs() / (truth.abs() + floor + 1e-300)).max()
    assert floor == 0 or worst <= 4 * relative + 0.02, f"one number is off by {worst:.2e}"


# (rows, columns, width, dtype, own, order of events, bytes for partial sums). Between them: edges in every
# direction and none, more and fewer steps than stages, own pairs in some tiles, all and none, several chunks,
# more tiles than clusters.
CASES = {
    "edges, chunks": (300, 530, 100, torch.bfloat16, 7, EARLY_COPIES, 1),
    "edges, late copies": (300, 530, 100, torch.bfloat16, -200, LATE_COPIES, MEBIBYTE),
    "whole tiles, no own": (256, 512, 64, torch.float16, 10_000, EARLY_COPIES, MEBIBYTE),
    "more steps than stages": (70, 40, 390, torch.float16, 0, LATE_COPIES, MEBIBYTE),
    "more steps, early": (130, 257, 328, torch.bfloat16, 100, EARLY_COPIES, MEBIBYTE),
    "one pair": (1, 1, 3, torch.bfloat16, 0, EARLY_COPIES, MEBIBYTE),
}


@pytest.fixture(params=CASES, scope="module")
def case(request, library):
    rows, columns, width, dtype, own, order, partial_bytes = CASES[request.param]
    library.configure(2, *order, partial_bytes)
    library.set_device_obstacle(None)
    image, text = features(rows, columns, width, dtype, own=own)
    return Kernels(library, image, text, own), *truth_of(image, text, own)


@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_sums_of_exponentials(case, scale):
    """Catches a wrong fragment, swizzle, mask, slot or chunk: each moves some row's or column's sum."""
    kernels, products, is_own = case
    row_lse, column_lse, own_products = kernels.lse(scale)
    assert not kernels.summed_twice  # which would mend what went wrong
    logits = scale * products
    rounding = 1e-5 + 4e-7 * scale  # of exponentials and their sums, and of products in fp32
    assert (row_lse - logits.logsumexp(1)).abs().max() < rounding
    assert (column_lse - logits.logsumexp(0)).abs().max() < rounding
    has = is_own.any(1)
    assert (own_products[has] - products[is_own]).abs().max() < 1e-6 if has.any() else True
    assert bool(own_products[~has].isnan().all())


def test_gradient_of_logits(case):
    kernels, products, is_own = case
    scale, row_weight, column_weight = 30.0, 0.75, 1.5
    logits = scale * products
    row_lse, column_lse = logits.logsumexp(1), logits.logsumexp(0)
    truth = row_weight * (logits - row_lse[:, None]).exp() + column_weight * (logits - column_lse).exp()
    truth = truth - (row_weight + column_weight) * is_own
    gradient, slope = kernels.gradient(scale, row_lse, column_lse, row_weight, column_weight)
    if gradient.numel() > 1:
        assert_near(gradient, truth, 2.5e-3, floor=1e-3)
        assert abs(slope - (truth * products).sum()) <= 1e-5 * (truth * products).abs().sum()
    else:
        assert abs(gradient.item()) < 1e-5  # one pair: p is 1


def test_sigmoid_loss(case):
    kernels, products, is_own = case
    scale, bias = 10.0, -3.0  # exp(-|L|) on both sides of 1/16
    signs = 2.0 * is_own - 1
    logits = scale * products + bias
    losses, truth = -torch.nn.functional.logsigmoid(signs * logits), -signs * torch.sigmoid(-signs * logits)
    gradient, sums = kernels.sigmoid(scale, bias)
    assert_near(gradient, truth, 2.5e-3, floor=1e-6)
    for actual, terms in zip(sums, (losses, truth * products, truth), strict=True):
        assert abs(actual - terms.sum()) <= 3e-6 * terms.abs().sum()
    if kernels.image.shape[0] < 100:
        assert torch.equal(kernels.sigmoid(scale, bias, with_gradient=False)[1], sums)


def small(library, image: Tensor, text: Tensor, order=EARLY_COPIES) -> Kernels:
    library.configure(2, *order, MEBIBYTE)
    library.set_device_obstacle(None)
    return Kernels(library, image.contiguous(), text.contiguous(), 0)


@pytest.mark.parametrize("kind", ["opposite", "un-normalised", "one row opposite"])
def test_sums_about_their_maximum(library, kind):
    """Features for which the one shift does not serve: sums that are 0 or infinite there."""
    image, text = features(80, 72, 64)
    if kind == "opposite":
        image = -image[:72].abs()
        text = text.abs()
    elif kind == "un-normalised":
        image = 30 * image[:72]
    else:
        image, text = image[:72].abs(), text.abs()
        image[5] *= -1
    scale = 100.0
    kernels = small(library, image, text, LATE_COPIES)
    row_lse, column_lse, _ = kernels.lse(scale)
    assert kernels.summed_twice
    logits = scale * truth_of(image, text, 0)[0]
    for actual, truth in ((row_lse, logits.logsumexp(1)), (column_lse, logits.logsumexp(0))):
        assert ((actual - truth) / truth.abs().clamp(min=10)).abs().max() < 3e-6
    # Such lse are out of reach of one exponential an element.
    gradient, _ = kernels.gradient(scale, row_lse, column_lse, 1.0, 1.0)
    truth = (logits - row_lse[:, None]).exp() + (logits - column_lse).exp() - 2 * torch.eye(72)
    assert_near(gradient, truth, 3e-3)


def test_gradient_of_logits_of_any_size(library):
    """Catches an lse rounded to one float: of logits of 1e6 that is up to 0.06, or 6 % of an exponential."""
    generator = torch.Generator().manual_seed(0)
    # Integers: products, and logits at scale 16, are exact whatever the order of a sum.
    image, text = (torch.randint(-100, 101, (72, 64), generator=generator).bfloat16() for _ in range(2))
    logits = 16 * truth_of(image, text, 0)[0]
    row_lse, column_lse = (logits.amax(k) + torch.linspace(0.1, 1, 72, dtype=torch.float64) for k in (1, 0))
    assert row_lse.min() > 5e5
    gradient, _ = small(library, image, text).gradient(16.0, row_lse, column_lse, 1.0, 1.0)
    truth = (logits - row_lse[:, None]).exp() + (logits - column_lse).exp() - 2 * torch.eye(72)
    torch.testing.assert_close(gradient.double(), truth, rtol=2**-8, atol=1e-6)


def test_easy_pairs_keep_their_gradient(library):
    """p of an own pair is 1 - 1e-6 or closer here: taken from a sum of floats, 1 - p would be rounding."""
    image, text = features(64, 64, 256, torch.float16, like=0.45)
    kernels = small(library, image, text)
    scale = 35.0
    logits = scale * truth_of(image, text, 0)[0]
    row_lse, column_lse, own_products = kernels.lse(scale)
    easiness = row_lse - (torch.tensor(scale) * own_products).double()
    truth = logits.logsumexp(1) - logits.diagonal()
    assert truth.min() < 1e-6
    assert ((easiness - truth).abs() / truth).max() < 1e-4
    gradient, _ = kernels.gradient(scale, row_lse, column_lse, 1000.0, 1000.0)
    p_minus_1 = torch.expm1(logits.diagonal() - logits.logsumexp(1))
    p_minus_1 += torch.expm1(logits.diagonal() - logits.logsumexp(0))
    assert_near(gradient.diagonal(), 1000 * p_minus_1, 1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_features(library, value):
    image, text = features(72, 72, 64)
    image[3, 5] = value
    kernels = small(library, image, text)
    row_lse, column_lse, own_products = kernels.lse(10.0)
    assert not (row_lse[3] - 10 * own_products[3].double()).isfinite()
    assert not kernels.sigmoid(10.0, -10.0)[1][0].isfinite()


def test_equal_bits_whatever_the_order_of_events(library):
    image, text = features(200, 300, 80)
    results = []
    for clusters, order in ((1, EARLY_COPIES), (3, LATE_COPIES)):
        kernels = small(library, image, text)
        library.configure(clusters, *order, MEBIBYTE)
        row_lse, column_lse, _ = kernels.lse(50.0)
        gradient, slope = kernels.gradient(50.0, row_lse, column_lse, 0.5, 0.5)
        results.append((row_lse, column_lse, gradient, torch.tensor(slope)))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_obstacles(library):
    library.set_device_obstacle(None)
    image, text = features(8, 8, 24)
    whole = Matrices(image.data_ptr(), text.data_ptr(), 32, 32, 8, 8, 24, 0, DTYPES[torch.bfloat16])

    def obstacle(**changes) -> str | None:
        fields = {name: getattr(whole, name) for name, _ in Matrices._fields_} | changes
        found = library.obstacle(Matrices(*fields.values()))
        return found.decode() if found else None

    assert obstacle() is None
    assert "16 bytes" in obstacle(image=image.data_ptr() + 2)
    assert "16 bytes" in obstacle(text_stride=33)
    assert "overlap" in obstacle(image_stride=16)
    assert "bfloat16" in obstacle(dtype=0)
    assert "no features" in obstacle(width=0)
    assert "2^30" in obstacle(columns=1 << 31)
    library.set_device_obstacle(b"another GPU")
    assert obstacle() == "another GPU"


def test_workspace_is_bounded(library):
    library.configure(2, *EARLY_COPIES, 128 * MEBIBYTE)
    assert library.workspace_bytes(32_768, 32_768, 512) < 130 * MEBIBYTE
    assert library.workspace_bytes(131_072, 131_072, 768) < 132 * MEBIBYTE


def find_tool(name: str) -> str | None:
    """From Triton's package, or beside nvcc."""
    try:
        from triton import backends
    except ImportError:
        return shutil.which(name)
    bundled = Path(backends.__file__).parent / "nvidia" / "bin" / name
    return str(bundled) if bundled.exists() else shutil.which(name)


@pytest.fixture(scope="module")
def machine_code(tmp_path_factory) -> Path:
    """The file compiled: by the last build if nothing has changed since, else here (half a minute)."""
    if find_tool("cuobjdump") is None:
        pytest.skip("needs cuobjdump, which Triton's package has")
    sources = [ROOT / "csrc" / name for name in ("contrastive_sm90.cu", "contrastive_sm90.cuh")]
    sources += [ROOT / "csrc" / name for name in ("sm90_hardware.h", "contrastive.h")]
    changed = max(path.stat().st_mtime for path in sources)
    for built in ROOT.glob("build/native-*/contrastive_sm90.cu.o"):
        if built.stat().st_mtime > changed:
            return built
    if NVCC is None:
        pytest.skip("needs nvcc")
    compiled = tmp_path_factory.mktemp("sm90") / "contrastive_sm90.cubin"
    flags = ["-std=c++17", "-O3", "-I", ROOT / "csrc", "-gencode=arch=compute_90a,code=sm_90a", "-cubin"]
    subprocess.run([NVCC, *flags, sources[0], "-o", compiled], check=True)
    return compiled


def dump(option: str, machine_code: Path) -> str:
    command = [find_tool("cuobjdump"), option, str(machine_code)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_compiled_resources(machine_code):
    """Catches a register too many, an array that is indexed at run time, static shared memory beside ours."""
    usage = re.findall(
        r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", dump("-res-usage", machine_code)
    )
    kernels = [fields for fields in usage if "product_kernel" in fields[0]]
    assert len(kernels) == 8  # four epilogues, two dtypes
    for name, registers, stack, shared in kernels:
        # 168 at the start, three warpgroups' share; the roles then trade. 1 KB is the system's.
        assert (int(registers), int(stack), int(shared)) == (168, 0, 1024), name


def test_compiled_instructions(machine_code):
    """Catches products or copies compiled to something else, spills, and wgmma one after the other."""
    functions = dump("-sass", machine_code).split("Function : ")
    kernels = {text.split()[0]: text for text in functions if "product_kernel" in text.split()[0]}
    assert len(kernels) == 8
    for name, text in kernels.items():
        assert text.count("HGMMA.64x256x16.F32") == 4, name
        assert (
            len(re.findall(r"UTMALDG\.2D ", text)) == len(re.findall(r"UTMALDG\.2D\.MULTICAST", text)) == 1
        ), name
        assert text.count("USETMAXREG") == 2, name
        # Of a stage's four products only the last ends a group; one group is left running meanwhile.
        assert text.count("gsb0, 0x1") == 1 and text.count("gsb0, 0x0") == 1, name
        assert not re.search(r"\b(STL|LDL)\b", text), f"{name} spills"
