"""DDIM inversion and reconstruction: the PSNR (dB) of the reconstructed images, by number of steps.

    python -m benchmarks.jobs.inversion             writes benchmarks/results/inversion.json

A few images of the checkpoint's world are embedded, inverted to x_T, and decoded again from (z, x_T) with the
same number of steps. For comparison the result also has the standard deviation of x_T, which is 1 for noise,
and the PSNR of images decoded from the same z and other noise.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.jobs.images import check_images
from benchmarks.timing.provenance import machine, save, versions
from dalle2_fast import DALLE2
from dalle2_fast.data import SceneStream, World
from dalle2_fast.evaluation.psnr import psnr


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.jobs.inversion", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 50, 100, 250])
    parser.add_argument("--refine", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", help="a folder; default: the checkpoint in the package")
    arguments = parser.parse_args()

    this_machine = machine()
    pipe = DALLE2.from_pretrained(arguments.checkpoint, device="cpu", dtype="fp32")
    size = pipe.decoder.image_size
    world = World.from_config(pipe.metadata["world"])
    stream = SceneStream(world, arguments.images, (size,), arguments.seed, split="iid")
    images = stream.batch(0)["images"][size]

    rows = []
    for guidance in dict.fromkeys((1.0, float(pipe.sampling["guidance"]))):
        for refine in arguments.refine:
            for steps in arguments.steps:
                pair = pipe.invert(images, steps=steps, guidance=guidance, refine=refine)
                options = dict(steps=steps, guidance=guidance, size=size, seed=arguments.seed)
                reconstructed = pipe.decode(pair.image_embed, x_T=pair.x_T, **options).images
                other = pipe.decode(pair.image_embed, **options).images
                check_images(reconstructed, tuple(images.shape))
                rows.append({
                    "guidance": guidance, "refine": refine, "steps": steps,
                    "psnr": round(psnr(reconstructed, images).mean().item(), 2),
                    "psnr_worst": round(psnr(reconstructed, images).min().item(), 2),
                    "noise_deviation": round(pair.x_T.std().item(), 3),
                    "psnr_other_noise": round(psnr(other, images).mean().item(), 2),
                })  # fmt: skip
                print(rows[-1], flush=True)
    path = save("inversion", {
        "machine": this_machine,
        "versions": versions("numpy", "safetensors"),
        "job": {"images": arguments.images, "size": size, "seed": arguments.seed, "dtype": "float32",
                "checkpoint": weights_hash(arguments.checkpoint), "threads": torch.get_num_threads()},
        "rows": rows,
    })  # fmt: skip
    print(path)


def weights_hash(checkpoint: str | None) -> str:
    from dalle2_fast.checkpoints import embedded_path, load_config

    path = checkpoint or embedded_path()
    return load_config(path).get("weights_sha256", "?")[:12]


if __name__ == "__main__":
    main()
