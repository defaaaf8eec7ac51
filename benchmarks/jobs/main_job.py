"""From a caption to images with the checkpoint in the package: seconds per stage on the CPU.

    python -m benchmarks.jobs.main_job            writes benchmarks/results/main_job.json

Start-up (imports and loading) is measured once, in this new process. The stages are the median of --repeats
runs after a first one, which is reported, too: a user of the command line waits for it.
"""

from __future__ import annotations

import time

START = time.perf_counter()  # before the other imports, which are part of the start-up

import torch  # noqa: E402

from benchmarks.cases.sizes import parameter_count  # noqa: E402
from benchmarks.jobs.images import CAPTION, check_images, medians, options  # noqa: E402
from benchmarks.timing.provenance import machine, save, versions  # noqa: E402
from dalle2_fast import DALLE2, keep_freed_memory  # noqa: E402

PARTS = ("clip", "prior", "decoder", "upsampler")


def run(pipe: DALLE2, num_images: int) -> tuple[torch.Tensor, dict[str, float]]:
    """The images of one run, and the seconds of its stages, of the rest and in total."""
    begin = time.perf_counter()
    made = pipe.generate(CAPTION, num_images, seed=0)
    total = time.perf_counter() - begin
    return made.images, {**made.seconds, "rest": total - sum(made.seconds.values()), "total": total}


def main() -> None:
    arguments = options("main_job", __doc__).parse_args()
    this_machine = machine()
    keep_freed_memory()  # as the command line does
    pipe = DALLE2.from_pretrained(arguments.checkpoint, device="cpu", dtype="fp32")
    startup = time.perf_counter() - START

    first, cold = run(pipe, arguments.num_images)
    check_images(first, (arguments.num_images, 3, 256, 256))
    runs = []
    for _ in range(arguments.repeats):
        images, seconds = run(pipe, arguments.num_images)
        if not torch.equal(images, first):
            raise RuntimeError("the same seed gave different images: nothing is reported")
        runs.append(seconds)

    path = save("main_job", {
        "machine": this_machine,
        "versions": versions("numpy", "safetensors"),
        "job": {"caption": CAPTION, "num_images": arguments.num_images, "size": 256, "dtype": "float32",
                **pipe.sampling},
        "parameters": {part: parameter_count(getattr(pipe, part)) for part in PARTS},
        "seconds": {"startup": round(startup, 3), "first_run": medians([cold]), "median": medians(runs)},
        "repeats": arguments.repeats,
    })
    print(path.read_text(), end="")


if __name__ == "__main__":
    main()
