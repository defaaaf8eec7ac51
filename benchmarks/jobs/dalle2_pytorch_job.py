"""The main job with DALLE2-pytorch's classes and with ours, compared in one run on the CPU.

    pip install torch torchvision dalle2-pytorch && pip install -e .
    python -m benchmarks.jobs.dalle2_pytorch_job          writes benchmarks/results/dalle2_pytorch_job.json

Three pipelines generate the same number of images of the same size with the same steps and guidance. The rows
that each net evaluates are counted and must agree:

    ours            the checkpoint in the package, whose U-Nets work on patches of pixels
    ours_plain      our classes without patches, random weights: U-Nets of DALLE2-pytorch's default shape
    dalle2_pytorch  its classes, random weights (it has no trained ones); its defaults except for sizes

Every net of the second and third has the parameter count of the first, as nearly as its widths allow. Random
weights take the same time as trained ones, so images are checked for shape and range only.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported; DALLE2-pytorch always shows its progress bars

import torch
from torch import Tensor, nn

from benchmarks.cases.registry import installed
from benchmarks.cases.sizes import parameter_count
from benchmarks.jobs.dalle2_pytorch_models import plain_pipeline, their_pipeline
from benchmarks.jobs.images import CAPTION, check_images, medians, options
from benchmarks.timing.provenance import machine, save, versions
from dalle2_fast import DALLE2


class TimedJob:
    """One of the three jobs. Its stages are timed, and the rows that its nets evaluate are counted."""

    def __init__(self, nets: dict[str, nn.Module], job: Callable[[], Tensor], seconds: dict[str, float]):
        self.nets, self.job, self.seconds = nets, job, seconds
        self.rows = dict.fromkeys(nets, 0)
        for stage, net in nets.items():
            # Our prior encodes the caption once and then calls `denoise`. DALLE2-pytorch calls `forward`
            # directly, so a forward hook would not see it.
            name = "denoise" if hasattr(net, "denoise") else "forward"
            setattr(net, name, self._counted(stage, getattr(net, name)))

    def _counted(self, stage: str, method: Callable) -> Callable:
        def call(x: Tensor, *args, **kwargs):
            self.rows[stage] += len(x)
            return method(x, *args, **kwargs)

        return call

    def run(self, images: int) -> dict[str, float]:
        self.rows.update(dict.fromkeys(self.rows, 0))
        self.seconds.clear()
        begin = time.perf_counter()
        made = self.job()
        total = time.perf_counter() - begin
        check_images(made.clamp(0, 1), (images, 3, 256, 256))  # its images may slightly exceed the range
        return {**self.seconds, "rest": total - sum(self.seconds.values()), "total": total}


def our_job(pipe: DALLE2, images: int) -> TimedJob:
    seconds: dict[str, float] = {}

    def job() -> Tensor:
        made = pipe.generate(CAPTION, images, seed=0)
        seconds.update(made.seconds)
        return made.images

    nets = {"prior": pipe.prior.net, "decoder": pipe.decoder.unet, "upsampler": pipe.upsampler.unet}
    return TimedJob(nets, job, seconds)


def rival_job(rival: nn.Module, pipe: DALLE2, images: int) -> TimedJob:
    """DALLE2-pytorch's job. Its stages are timed at the methods that `DALLE2.forward` calls."""
    seconds: dict[str, float] = {}

    def timed(stage: Callable[..., str], method: Callable) -> Callable:
        def call(*args, **kwargs):
            inner, begin = seconds.get("text", 0.0), time.perf_counter()
            result = method(*args, **kwargs)
            name = stage(*args)
            took = time.perf_counter() - begin
            if name != "text":  # prior.sample also encodes the caption
                took -= seconds.get("text", 0.0) - inner
            seconds[name] = seconds.get(name, 0.0) + took
            return result

        return call

    prior, decoder = rival.prior, rival.decoder
    for owner in (prior, decoder):
        owner.clip.embed_text = timed(lambda *args: "text", owner.clip.embed_text)
    prior.sample = timed(lambda *args: "prior", prior.sample)
    first = decoder.unets[0]
    decoder.p_sample_loop = timed(lambda unet, *args: "decoder" if unet is first else "upsampler",
                                  decoder.p_sample_loop)
    tokens = pipe.tokenizer.encode(CAPTION).expand(images, -1)
    scale, prior_scale = (pipe.sampling["guidance"], 1.0), pipe.sampling["prior_guidance"]

    def job() -> Tensor:
        made = rival(tokens, cond_scale=scale, prior_cond_scale=prior_scale)
        return made.reshape(images, *made.shape[-3:])  # one caption: one image, without B

    nets = {"prior": prior.net, "decoder": first, "upsampler": decoder.unets[1]}
    return TimedJob(nets, job, seconds)


def reported(pipe: DALLE2 | None, stage: str, net: nn.Module) -> nn.Module:
    """The module whose parameters are reported: for our decoder and upsampler it is more than the U-Net."""
    return net if pipe is None or stage == "prior" else getattr(pipe, stage)


def describe(channels: list[int], patch_size: int = 1, **others) -> str:
    return f"channels {'-'.join(map(str, channels))}, patch size {patch_size}"


def main() -> None:
    parser = options("dalle2_pytorch_job", __doc__)
    arguments = parser.parse_args()
    if not installed("dalle2_pytorch"):
        parser.error("needs the package dalle2-pytorch: pip install torchvision dalle2-pytorch")
    this_machine, images = machine(), arguments.num_images

    torch.manual_seed(0)
    pipe = DALLE2.from_pretrained(arguments.checkpoint, device="cpu", dtype="fp32")
    pipe.sampling["candidates"] = 1  # DALLE2-pytorch chooses among embeddings, not among images
    plain, rival = plain_pipeline(pipe), their_pipeline(pipe)
    # The first two share text tower and prior. A job wraps its prior to count its rows, hence a copy.
    plain.prior = copy.deepcopy(pipe.prior)
    jobs = {
        "ours": our_job(pipe, images),
        "ours_plain": our_job(plain, images),
        "dalle2_pytorch": rival_job(rival, pipe, images),
    }
    for name, job in jobs.items():  # warms up, and checks the jobs before they are timed
        job.run(images)
        if name == "ours":
            wanted = dict(job.rows)
        if job.rows != wanted:
            raise RuntimeError(f"{name} evaluates {job.rows} rows, ours {wanted}: not the same job")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
    for _ in range(arguments.repeats):  # in turns, so that other load on the machine affects all of them
        for name, job in jobs.items():
            runs[name].append(job.run(images))

    texts = {"ours": pipe.clip, "ours_plain": plain.clip, "dalle2_pytorch": rival.prior.clip.clip}
    towers = {"ours": pipe.clip.visual, "ours_plain": plain.clip.visual,
              "dalle2_pytorch": rival.prior.clip.clip.visual_transformer}
    wholes = {"ours": pipe, "ours_plain": plain}
    path = save("dalle2_pytorch_job", {
        "machine": this_machine,
        "versions": versions("dalle2-pytorch", "torchvision", "numpy"),
        "job": {"caption": CAPTION, "num_images": images, "size": 256, "dtype": "float32", **pipe.sampling},
        "rows_per_net": wanted,
        "parameters": {name: {
            "text": parameter_count(texts[name]) - parameter_count(towers[name]),
            **{stage: parameter_count(reported(wholes.get(name), stage, net))
               for stage, net in job.nets.items()},
        } for name, job in jobs.items()},
        "unets": {
            **{name: [describe(**part.unet.config) for part in (whole.decoder, whole.upsampler)]
               for name, whole in wholes.items()},
            "dalle2_pytorch": [describe([net._locals["dim"] * level for level in net._locals["dim_mults"]])
                               for net in rival.decoder.unets],
        },
        "seconds": {name: medians(runs[name]) for name in jobs},
        "repeats": arguments.repeats,
    })
    print(path.read_text(), end="")


if __name__ == "__main__":
    main()
