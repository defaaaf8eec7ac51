"""A command that draws, from arguments to file: checks before any work, the chain, the grid, the report."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dalle2_fast import __version__
from dalle2_fast.cli import arguments
from dalle2_fast.cli import image as cli_image
from dalle2_fast.cli import picture as cli_picture
from dalle2_fast.pipeline import device

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from dalle2_fast.pipeline.dalle2 import DALLE2


class Job:
    """Made at once it refuses what cannot be written or does not exist; `load` then reads the checkpoint."""

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        self.args, self.began = args, time.perf_counter()
        self.seed = secrets.randbelow(2**32) if args.seed is None else args.seed
        self.output = args.output or Path(cli_picture.file_name(name, self.seed))
        if self.output.suffix.lower() != ".png":
            raise ValueError(f"--output: expected a name that ends in .png, got {str(self.output)!r}")
        if self.output.is_dir():
            raise IsADirectoryError(f"--output: {self.output} is a folder, expected a file name")
        cli_picture.check_writable(self.output.parent, "--output")
        if args.individual is not None:
            cli_picture.check_writable(args.individual, "--individual")
        self.device = device.choose_device(args.device)
        self.dtype = device.choose_dtype(args.dtype, self.device)
        self.start_up, self.notes = 0.0, []

    def load(self) -> DALLE2:
        from dalle2_fast.ops import _build_info
        from dalle2_fast.pipeline.dalle2 import DALLE2

        emulated = self.device.type == "cpu" and not _build_info.cpu_has_bfloat16()
        if self.args.dtype in ("bf16", "fp16") and emulated:
            print(f"note: this CPU computes {self.args.dtype} in software; fp32 is faster", file=sys.stderr)
        self.pipe = DALLE2.from_pretrained(self.args.checkpoint, device=self.device, dtype=self.dtype)
        self.start_up = time.perf_counter() - self.began
        return self.pipe

    @property
    def size(self) -> int:
        """The side of what is drawn; wrong ones are refused by the chain."""
        return self.args.size or self.pipe.sizes[-1]

    def square(self, picture: Image, path: Path, side: int | None = None) -> Tensor:
        """The opened picture as the chain takes it, square; what it is made into (`side`, by default the size
        of what is drawn) is said at the end, so that a refusal stays one line."""
        image, note = cli_image.square(picture, path, side or self.size)
        self.notes += [note] if note else []
        return image

    def shared(self) -> dict[str, object]:
        """Seed, settings and progress, as every method of the chain takes them."""
        common = dict(seed=self.seed, batch_size=self.args.batch_size, progress=not self.args.quiet)
        return common | arguments.settings(self.args)

    def write(
        self,
        pictures: Sequence[Image],
        seconds: dict[str, float],
        *,
        texts: dict[str, object],
        lines: dict[str, object] | None = None,
        labels: Sequence[str] | None = None,
        columns: int | None = None,
    ) -> int:
        """Write the grid (and single pictures), print where it is and what it took; the exit code."""
        given = arguments.settings(self.args).items()
        settings = self.pipe.sampling | {name: value for name, value in given if value is not None}
        settings |= {"device": self.device.type, "dtype": self._dtype}
        texts = texts | {"seed": self.seed, "settings": json.dumps(settings)}
        texts |= {"Software": f"dalle2_fast {__version__}"}
        self.output.parent.mkdir(parents=True, exist_ok=True)
        sheet = cli_picture.grid(pictures, labels=labels, columns=columns)
        cli_picture.save_png(sheet, self.output, texts | {"num_images": len(pictures)})
        for note in self.notes:
            print(note, file=sys.stderr)
        width, height = pictures[0].size
        report = {"image": f"{self.output.resolve()} ({len(pictures)} of {width} x {height})"}
        if self.args.individual is not None:
            self.args.individual.mkdir(parents=True, exist_ok=True)
            for index, picture in enumerate(pictures):
                one = texts | {"index": index} | ({"label": labels[index]} if labels else {})
                cli_picture.save_png(picture, self.args.individual / f"{index:03d}.png", one)
            report["individual"] = str(self.args.individual.resolve())
        seconds = {"start-up": self.start_up, **seconds}
        report |= lines or {}
        report |= {
            "seed": self.seed,
            "device": f"{self._device_name()}, {self._dtype}",
            "backend": _backend_name(),
            "seconds": ", ".join(f"{name} {spent:.2f}" for name, spent in seconds.items())
            + f", in all {sum(seconds.values()):.2f}",
        }
        for key, value in report.items():
            print(f"{key + ':':<12}{value}")
        return 0

    @property
    def _dtype(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def _device_name(self) -> str:
        import torch

        if self.device.type == "cuda":
            return f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        threads = f"{self.device} ({torch.get_num_threads()} threads)"
        return threads if self.device.type == "cpu" else str(self.device)


def _backend_name() -> str:
    from dalle2_fast.ops._build_info import KERNELS, build_info

    fused = [name for name in build_info()["fused_ops"] if name in KERNELS]  # the losses draw nothing
    return f"fused ({', '.join(fused)}), else reference" if fused else "reference (plain PyTorch)"
