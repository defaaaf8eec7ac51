"""Caption -> pictures with the checkpoint in the package: seconds per stage on the CPU.

    python -m benchmarks.jobs.main_job            writes benchmarks/results/main_job.json

Start-up (imports and loading) is measured once, in this fresh process; the stages are the median of --repeats
runs after a first one, which is reported too because it is what a user of the command line waits for.
"""

from __future__ import annotations

import time

START = time.perf_counter()

import argparse  # noqa: E402  (START comes first: imports are part of what is measured)

import torch  # noqa: E402

from benchmarks.timing.provenance import check_images, machine, medians, parameters, save, versions  # noqa: E402
from dalle2_fast import DALLE2  # noqa: E402

CAPTION = "a large red circle above a small blue square on a navy background"
PARTS = ("clip", "prior", "decoder", "upsampler")


def run(pipe: DALLE2, num_images: int) -> tuple[torch.Tensor, dict[str, float]]:
    """The pictures of one run and the seconds of its stages, the rest and the whole."""
    begin = time.perf_counter()
    made = pipe.generate(CAPTION, num_images, seed=0)
    total = time.perf_counter() - begin
    return made.images, {**made.seconds, "rest": total - sum(made.seconds.values()), "total": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpoint", help="a folder; default: the checkpoint in the package")
    arguments = parser.parse_args()

    where = machine()
    pipe = DALLE2.from_pretrained(arguments.checkpoint)
    startup = time.perf_counter() - START

    first, cold = run(pipe, arguments.num_images)
    check_images(first, (arguments.num_images, 3, 256, 256))
    runs = []
    for _ in range(arguments.repeats):
        images, seconds = run(pipe, arguments.num_images)
        if not torch.equal(images, first):
            raise RuntimeError("the same seed gave different pictures: nothing is reported")
        runs.append(seconds)

    path = save("main_job", {
        "machine": where,
        "versions": versions("numpy", "safetensors"),
        "job": {"caption": CAPTION, "num_images": arguments.num_images, "size": 256, "dtype": "float32",
                **pipe.sampling},
        "parameters": {part: parameters(getattr(pipe, part)) for part in PARTS},
        "seconds": {"startup": round(startup, 3), "first_run": medians([cold]), "median": medians(runs)},
        "repeats": arguments.repeats,
    })
    print(path.read_text(), end="")


if __name__ == "__main__":
    main()
