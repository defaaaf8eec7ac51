"""DDIM inversion, there and back: how near a picture comes to itself, by steps (PSNR, dB).

    python -m benchmarks.jobs.inversion             writes benchmarks/results/inversion.json

A few pictures of the checkpoint's world are embedded, inverted to x_T and drawn again from (z, x_T) with as
many steps. Beside the PSNR stands the deviation of x_T, which of noise would be 1, and, as the mark to
compare with, the PSNR of pictures drawn from the same z and other noise.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.timing.provenance import check_images, machine, save, versions
from dalle2_fast import DALLE2
from dalle2_fast.data import SceneStream, World
from dalle2_fast.evaluation.upsampling import psnr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 25, 50, 100, 250])
    parser.add_argument("--refine", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", help="a folder; default: the checkpoint in the package")
    arguments = parser.parse_args()

    where = machine()
    pipe = DALLE2.from_pretrained(arguments.checkpoint)
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
                back = pipe.decode(pair.image_embed, x_T=pair.x_T, **options).images
                other = pipe.decode(pair.image_embed, **options).images
                check_images(back, tuple(images.shape))
                rows.append({
                    "guidance": guidance, "refine": refine, "steps": steps,
                    "psnr": round(psnr(back, images).mean().item(), 2),
                    "psnr_worst": round(psnr(back, images).min().item(), 2),
                    "noise_deviation": round(pair.x_T.std().item(), 3),
                    "psnr_other_noise": round(psnr(other, images).mean().item(), 2),
                })  # fmt: skip
                print(rows[-1], flush=True)
    path = save("inversion", {
        "machine": where,
        "versions": versions("numpy", "safetensors"),
        "job": {"images": arguments.images, "size": size, "seed": arguments.seed, "dtype": "float32",
                "checkpoint": weights(arguments.checkpoint), "threads": torch.get_num_threads()},
        "rows": rows,
    })  # fmt: skip
    print(path)


def weights(checkpoint: str | None) -> str:
    from dalle2_fast.checkpoints import embedded_path, load_config

    path = checkpoint or embedded_path()
    return load_config(path).get("weights_sha256", "?")[:12]


if __name__ == "__main__":
    main()
