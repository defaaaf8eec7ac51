"""What the distributed losses compute in W processes, and the truth about it from one process.

`truth` simulates open_clip's W processes in one, by autograd on the whole batch: what a process has gathered
without gradient is detached. It uses no collective and nothing of `dalle2_fast.losses`.
"""

from __future__ import annotations

import importlib.util
import itertools
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.losses import ClipLoss, SigLipLoss, SoftClipLoss
from dalle2_fast.models.clip import CLIP

N, D, SCALE, BIAS = 3, 5, 9.0, -4.0  # N pairs in each process
CLIP_MODES = list(itertools.product(("clip",), (False, True), (False, True)))  # local_loss, gather_with_grad
MODES = [
    *CLIP_MODES,
    ("soft", False, False),
    ("soft", False, True),
    *(("siglip", exchange) for exchange in ("bidir", "shift", "reduce", "gather")),
]
try:  # here and not where it is used, because the fork server then imports it once
    import open_clip.loss as open_clip_loss
except ImportError:
    open_clip_loss = None

FUSED = "fused" if importlib.util.find_spec("dalle2_fast._C") else "reference"
ROUNDED = [(mode, dtype) for mode in (*CLIP_MODES, ("siglip", "bidir"))
           for dtype in (torch.float32, torch.bfloat16, torch.float16)]  # fmt: skip
WRAPPED = [*((mode, "ddp") for mode in (*CLIP_MODES, ("siglip", "bidir"))),
           *((mode, "fsdp") for mode in (("clip", True, True), ("siglip", "bidir")))]  # fmt: skip


def features(world_size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two of [W, N, D], rounded to dtype, as float64."""
    generator = torch.Generator().manual_seed(world_size)
    image, text = torch.randn(2, world_size, N, D, generator=generator, dtype=torch.float64)
    return F.normalize(image, dim=-1).to(dtype).double(), F.normalize(image + text, dim=-1).to(dtype).double()


UPSTREAM = {
    "equal": (1.0, 1.0, 1.0, 1.0),
    "different": (0.5, 1.5, 2.5, 3.5),
    "zeros": (1.0, 0.0, 1.0, 0.0),
    "signs": (0.5, -1.5, 0.0, 2.0),
    "all zero": (0.0, 0.0, 0.0, 0.0),
}


def upstream(world_size: int, weights: str) -> list[float]:
    """The gradient that reaches each process's loss."""
    return list(UPSTREAM[weights][:world_size])


def build(mode: tuple, rank: int, world_size: int, library=None, impl="auto") -> nn.Module:
    """The loss of a mode, ours or that of an open_clip-like library."""
    group = dict(rank=rank, world_size=world_size) | ({} if library else dict(impl=impl))
    if mode[0] == "siglip":
        return (library.SigLipLoss if library else SigLipLoss)(dist_impl=mode[1], **group)
    kind = SoftClipLoss if mode[0] == "soft" else (library.ClipLoss if library else ClipLoss)
    return kind(local_loss=mode[1], gather_with_grad=mode[2], cache_labels=True, **group)


# -------------------------------------------------------------------------------------------------- the truth


def truth(mode: tuple, image: Tensor, text: Tensor, grads: list[float]) -> list[dict[str, Tensor]]:
    """The results of every process, as `results` gives them, from features [W, N, D] in float64."""
    world = len(image)
    images, texts = ([block.clone().requires_grad_() for block in blocks] for blocks in (image, text))
    scales = [torch.tensor(SCALE, dtype=torch.float64, requires_grad=True) for _ in range(world)]
    biases = [torch.tensor(BIAS, dtype=torch.float64, requires_grad=True) for _ in range(world)]
    losses = [_process_loss(mode, rank, images, texts, scales[rank], biases[rank]) for rank in range(world)]
    sum(g * loss for g, loss in zip(grads, losses, strict=True)).backward()
    rows = zip(losses, images, texts, scales, biases, strict=True)
    return [
        {"loss": loss.detach(), "d image": i.grad, "d text": t.grad, "d scale": s.grad,
         "d bias": torch.zeros_like(b) if b.grad is None else b.grad}
        for loss, i, t, s, b in rows
    ]  # fmt: skip


def _process_loss(mode, rank, images, texts, scale, bias) -> Tensor:
    here = slice(rank * N, rank * N + N)
    if mode[0] == "siglip":
        logits = scale * images[rank] @ torch.cat(texts).T + bias
        signs = torch.full_like(logits, -1)
        signs[:, here].fill_diagonal_(1)
        return -F.logsigmoid(signs * logits).sum() / N
    kind, local, with_grad = mode

    def gathered(blocks):
        alone = len(blocks) == 1
        kept = [b if with_grad or alone or (not local and k == rank) else b.detach()
                for k, b in enumerate(blocks)]  # fmt: skip
        return torch.cat(kept)

    all_images, all_texts = gathered(images), gathered(texts)
    if local and len(images) > 1:
        by_image = scale * images[rank] @ all_texts.T
        by_text = scale * texts[rank] @ all_images.T
        labels = torch.arange(here.start, here.stop)
    else:
        by_image = scale * all_images @ all_texts.T
        by_text, labels = by_image.T, torch.arange(len(all_images))
    if kind == "soft":
        labels = (scale * (all_images @ all_images.T + all_texts @ all_texts.T) / 2).softmax(1).detach()
    return (F.cross_entropy(by_image, labels) + F.cross_entropy(by_text, labels)) / 2


# ------------------------------------------------------------------------------------------- in every process


def results(
    mode, rank, world_size, grad=1.0, dtype=torch.float64, library=None, impl="auto"
) -> dict[str, Tensor]:
    image, text = features(world_size, dtype)
    image, text = (value[rank].to(dtype).requires_grad_() for value in (image, text))
    scalar_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    scale, bias = (torch.tensor(value, dtype=scalar_dtype, requires_grad=True) for value in (SCALE, BIAS))
    biases = {} if mode[0] == "soft" or library and mode[0] == "clip" else {"logit_bias": bias}
    loss = build(mode, rank, world_size, library, impl)(image, text, scale, **biases)
    loss.backward(torch.full_like(loss, grad))
    return {"loss": loss.detach(), "d image": image.grad, "d text": text.grad, "d scale": scale.grad,
            "d bias": torch.zeros_like(bias) if bias.grad is None else bias.grad}  # fmt: skip


def everything(rank: int, world_size: int) -> dict:
    """All results that one start of the processes can give."""
    answers = {}
    for mode in MODES:
        for weights, impl in itertools.product(UPSTREAM, ("reference", FUSED)):
            grad = upstream(world_size, weights)[rank]
            answers["exact", mode, weights, impl] = results(mode, rank, world_size, grad, impl=impl)
    if world_size == 2:
        for mode, dtype in ROUNDED:
            answers["rounded", mode, dtype] = results(mode, rank, world_size, dtype=dtype, impl=FUSED)
        for mode, wrapper in WRAPPED:
            answers["model", mode, wrapper] = trained(mode, rank, world_size, wrapper)
        answers["frozen"] = frozen(rank, world_size)
        answers["options"] = options(rank, world_size)
        answers["errors"] = errors(rank, world_size)
    return answers


def frozen(rank, world_size) -> list:
    """A frozen image tower, no gradients at all, and a number for the scale."""
    image, text = (value[rank] for value in features(world_size))
    answers = []
    for mode in MODES:
        loss, bias = build(mode, rank, world_size), () if mode[0] == "soft" else (BIAS,)
        with torch.no_grad():
            value = loss(image, text, SCALE, *bias)
        leaf = text.clone().requires_grad_()
        loss(image, leaf, SCALE, *bias).backward()
        answers.append((mode, value, leaf.grad))
    return answers


def options(rank, world_size) -> list:
    """The loss for output_dict=True, strided features, a scale of shape [1], mixed dtypes, autocast."""
    image, text = (value[rank].float() for value in features(world_size))
    strided, scale = image.T.contiguous().T, torch.tensor([SCALE])
    answers = []
    for mode in (*CLIP_MODES, ("soft", False, True), ("siglip", "gather"), ("siglip", "bidir")):
        loss = build(mode, rank, world_size)
        with torch.autocast("cpu", torch.bfloat16):
            cast = loss(image, text, SCALE, BIAS)
        in_dict = loss(image, text, SCALE, BIAS, output_dict=True)["contrastive_loss"]
        answers.append((mode, [
            loss(image, text, SCALE, BIAS), in_dict,
            loss(strided, text, scale, torch.tensor(BIAS)), loss(image.double(), text, SCALE, BIAS), cast,
        ]))  # fmt: skip
    return answers


def errors(rank, world_size) -> dict[str, str]:
    """What each wrong call raises here. All processes must raise, and the next call must work."""
    image, text = (value[rank] for value in features(world_size))
    last = rank == world_size - 1

    def call(kind=ClipLoss, pair=(image, text), group=(rank, world_size), **keywords):
        return kind(rank=group[0], world_size=group[1], **keywords)(*pair, SCALE, BIAS)

    calls = {
        "rows": lambda: call(pair=(image[: N - last], text[: N - last])),
        "width": lambda: call(SigLipLoss, pair=(image[:, : D - last], text[:, : D - last])),
        "dtype": lambda: call(pair=(image.float(), text.float()) if last else (image, text)),
        "options": lambda: call(local_loss=last),
        "exchange": lambda: call(SigLipLoss, dist_impl="shift" if last else "gather"),
        "arguments": lambda: call(pair=(image.long() if last else image, text)),
        "empty": lambda: call(pair=(image[:0], text[:0]) if last else (image, text)),
        "rank": lambda: call(group=((rank + 1) % world_size, world_size)),
        "world": lambda: call(group=(rank, world_size + 1)),
        "soft": lambda: call(SoftClipLoss, local_loss=True),
        "grad": lambda: torch.func.grad(lambda image: call(pair=(image, text)))(image),
        "jvp": lambda: torch.func.jvp(lambda text: call(SigLipLoss, (image, text)), (text,), (text,)),
    }
    answers = {}
    for name, wrong in calls.items():
        try:
            wrong()
        except Exception as error:
            answers[name] = f"{type(error).__name__}: {error}"
        else:
            answers[name] = "nothing"
        assert call().isfinite()
    return answers


# ----------------------------------------------------------------------------------- wrapped in DDP and FSDP2


class Towers(nn.Module):
    """A tiny CLIP whose forward returns what open_clip's does."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.clip = CLIP(
                dim_text=8, dim_image=8, dim_latent=8, num_text_tokens=11, text_enc_depth=1, text_seq_len=4,
                text_heads=2, visual_enc_depth=1, visual_heads=2, visual_image_size=8, visual_patch_size=4,
            ).double()  # fmt: skip

    def forward(self, images: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.clip.encode_image(images), self.clip.encode_text(text)[0], self.clip.logit_scale.exp()


def batch(world_size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(world_size * N, 3, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(1, 11, (world_size * N, 4), generator=generator)


def trained(mode, rank, world_size, wrapper) -> dict[str, Tensor]:
    """The parameters' gradients after one backward pass through the wrapped model."""
    model = Towers()
    if wrapper == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        scale = model.clip.logit_scale  # FSDP2 takes no scalars
        model.clip.logit_scale = nn.Parameter(scale.detach().reshape(1))
        mesh = dist.init_device_mesh("cpu", (world_size,))
        for block in (model.clip.visual, model):
            fully_shard(block, mesh=mesh)
        wrapped = model
    here = slice(rank * N, rank * N + N)
    images, text = batch(world_size)
    bias = () if mode[0] == "soft" else (BIAS,)
    build(mode, rank, world_size)(*wrapped(images[here], text[here]), *bias).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}


# ------------------------------------------------------------------------------------------ failing processes


def one_dies(rank: int, world_size: int):
    image, text = (value[rank] for value in features(world_size))
    if rank == 1:
        raise ArithmeticError("out of luck")
    return ClipLoss(rank=rank, world_size=world_size)(image, text, SCALE)


def one_sleeps(rank: int, world_size: int, seconds: float):
    image, text = (value[rank] for value in features(world_size))
    if rank == 1:
        time.sleep(2 * seconds)
        raise ArithmeticError("too late")
    start = time.monotonic()
    try:
        return SigLipLoss(rank=rank, world_size=world_size)(image, text, SCALE, BIAS)
    except Exception as error:
        raise RuntimeError(f"after {time.monotonic() - start:.1f} s: {error}") from error


def one_skips_backward(rank: int, world_size: int):
    image, text = (value[rank].requires_grad_() for value in features(world_size))
    loss = ClipLoss(True, True, rank=rank, world_size=world_size)(image, text, SCALE)
    if rank == 1:
        raise ArithmeticError("out of luck")
    loss.backward()
    return loss.detach()


def like_open_clip(rank: int, world_size: int) -> dict:
    """(ours, theirs) for every mode that open_clip has."""
    answers = {}
    for mode, weights in itertools.product(MODES, UPSTREAM):
        if mode[0] != "soft":
            grad = upstream(world_size, weights)[rank]
            pair = [results(mode, rank, world_size, grad, library=lib) for lib in (None, open_clip_loss)]
            answers[mode, weights] = pair
    return answers
