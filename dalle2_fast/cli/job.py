"""A command that makes images, from its arguments to its files: checks, pipeline, grid, report."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dalle2_fast import __version__
from dalle2_fast.cli.arguments import given_decoder_options, given_settings
from dalle2_fast.cli.checks.request import check_request
from dalle2_fast.cli.image_files import (
    MAX_COLUMNS,
    check_format,
    check_space,
    check_writable,
    default_file_name,
    free_path,
    save_image,
    square_image,
)
from dalle2_fast.pipeline.device import choose_device, choose_dtype

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from dalle2_fast.pipeline.dalle2 import DALLE2


OUTPUTS = Path("outputs")  # the folder of files whose name was not given
QUALITY = 90  # of JPEG and WebP


class Job:
    """One run of such a command: construct it, `load` the pipeline, call it with `options()`, `write`.

    Args:
        args: the parsed command line.
        name: what is made, for the default file name.

    Raises:
        ValueError, OSError: what the checkpoint cannot do according to its config.json, or a file that could
            not be written.
    """

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        self.args, self.began = args, time.perf_counter()
        # Not the module secrets, whose imports take a tenth of the time to an error.
        self.seed = int.from_bytes(os.urandom(4), "big") if args.seed is None else args.seed
        check_request(args, given_settings(args))
        self.output = args.output or free_path(OUTPUTS / default_file_name(name, self.seed))
        if check_format(self.output, "--output") == "PNG" and args.quality is not None:
            raise ValueError(f"--quality: is for .jpg and .webp, got {args.quality} for {self.output.name}")
        check_writable(self.output, "--output")
        if args.individual is not None:
            check_writable(args.individual / f"000{self.output.suffix}", "--individual")
        self.start_up = 0.0  # seconds
        self.notes: list[str] = []  # printed at the end, so that an error stays one line

    def load(self) -> DALLE2:
        """Read the checkpoint. ValueError for a device that does not exist."""
        # Not in the constructor: this is where torch is imported.
        self.device = choose_device(self.args.device)
        self.dtype = choose_dtype(self.args.dtype, self.device)
        self.graphs = "auto" if self.args.graphs is None else self.args.graphs
        from dalle2_fast.pipeline.compilation.graphs import check_graphs

        check_graphs(self.graphs, self.device, "--graphs")
        from dalle2_fast.ops._build_info import cpu_has_bfloat16_units
        from dalle2_fast.pipeline.dalle2 import DALLE2

        slower = self.device.type == "cpu" and not cpu_has_bfloat16_units()
        if self.args.dtype in ("bf16", "fp16") and slower:
            dtype = self.args.dtype
            print(f"note: this CPU has no matrix units for {dtype}; fp32 is faster", file=sys.stderr)
        self.pipe = DALLE2.from_pretrained(self.args.checkpoint, device=self.device, dtype=self.dtype)
        if self.args.compile is not None:
            self.pipe.compile(self.args.compile)
        per_caption = getattr(self.args, "num_images", 1)
        captions = len(getattr(self.args, "captions", [""]))
        count = captions * per_caption + MAX_COLUMNS  # some commands show others in addition
        side = getattr(self.args, "size", None) or self.pipe.sizes[-1]
        check_space(self.output.parent, count, side, "--output")
        if self.args.individual is not None:
            check_space(self.args.individual, count, side, "--individual")
        self.start_up = time.perf_counter() - self.began
        return self.pipe

    @property
    def progress(self) -> bool:
        """Whether to draw progress bars, for which stderr must not be closed."""
        return not self.args.quiet and sys.stderr is not None

    @property
    def size(self) -> int:
        """The side of the images to be made; the pipeline refuses a wrong one."""
        return self.args.size or self.pipe.sizes[-1]

    def square(self, image: Image, path: Path, side: int | None = None) -> Tensor:
        """The central square of an opened image, [1, 3, S, S]; the report says how the image is changed.

        side: the size to which the pipeline will resize it; None is `size`.
        """
        square, note = square_image(image, path, side or self.size)
        self.notes += [note] if note else []
        return square

    def options(self) -> dict[str, Any]:
        """Seed, batch size, progress, graphs and settings, as the methods of the pipeline take them."""
        shared = dict(seed=self.seed, batch_size=self.args.batch_size, progress=self.progress)
        settings = given_settings(self.args) | given_decoder_options(self.args)
        return shared | dict(graphs=self.graphs) | settings

    def write(
        self,
        images: Sequence[Image],
        seconds: Mapping[str, float],
        graphs: Mapping[str, str],
        *,
        texts: Mapping[str, object],
        lines: Mapping[str, object] | None = None,
        labels: Sequence[str] | None = None,
        columns: int | None = None,
        captions: Sequence[str] | None = None,
    ) -> int:
        """Write the grid, and the images one by one if asked for, and print the report.

        Args:
            images: of one size, at least one.
            seconds: stage -> seconds.
            graphs: stage -> what became of its CUDA graph, see Generation.
            texts: what this command adds to the text chunks of the PNG files.
            lines: what it adds to the report.
            labels: a line of text below each image.
            columns: of the grid.
            captions: one for each image, for its own file.

        Returns:
            The exit code, 0.
        """
        from dalle2_fast.data.images import image_grid

        texts = {**texts, **self._provenance()}
        self.output.parent.mkdir(parents=True, exist_ok=True)
        grid = image_grid(images, labels=labels, columns=columns)
        self._save(grid, self.output, texts | {"num_images": len(images)})
        for note in self.notes:
            print(note, file=sys.stderr)
        if self.args.individual is not None:
            self._write_individual(images, texts, labels, captions)
        width, height = images[0].size
        total = time.perf_counter() - self.began
        seconds = {"start-up": self.start_up, **seconds}
        seconds["rest"] = max(0.0, total - sum(seconds.values()))  # such as embedding images, writing files
        facts = {
            "image": str(self.output.resolve()),
            "images": len(images),
            "width": width,
            "height": height,
            "individual": None if self.args.individual is None else str(self.args.individual.resolve()),
            **(lines or {}),
            "graphs": dict(graphs),
            "seed": self.seed,
            "device": self._device_name(),
            "dtype": self._dtype_name(),
            "backend": self.args.compile or _backend_name(),
            "seconds": seconds | {"in all": total},
        }
        print(json.dumps(facts) if self.args.json else _as_text(facts, lines or {}))
        return 0

    def _provenance(self) -> dict[str, object]:
        """Text chunks from which the images can be made again."""
        given = {name: value for name, value in given_settings(self.args).items() if value is not None}
        given |= given_decoder_options(self.args)
        settings = self.pipe.sampling | given | {"device": self.device.type, "dtype": self._dtype_name()}
        if self.args.compile is not None:
            settings["compile"] = self.args.compile  # its results differ from others by rounding
        return {
            "seed": self.seed,
            "settings": json.dumps(settings),
            "Software": f"dalle2_fast {__version__}",
        }

    def _write_individual(
        self,
        images: Sequence[Image],
        texts: dict[str, object],
        labels: Sequence[str] | None,
        captions: Sequence[str] | None,
    ) -> None:
        folder = self.args.individual
        folder.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(images):
            own = {"label": labels[index]} if labels else {}
            own |= {"caption": captions[index]} if captions else {}
            self._save(image, folder / f"{index:03d}{self.output.suffix}", texts | {"index": index} | own)

    def _save(self, image: Image, path: Path, texts: Mapping[str, object]) -> None:
        save_image(image, path, texts, self.args.quality or QUALITY)

    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def _device_name(self) -> str:
        import torch

        if self.device.type == "cuda":
            return f"{self.device} ({torch.cuda.get_device_name(self.device)})"
        if self.device.type == "cpu":
            return f"{self.device} ({torch.get_num_threads()} threads)"
        return str(self.device)


def _as_text(facts: dict[str, Any], lines: Mapping[str, object]) -> str:
    """The report for a person: one line per fact."""
    size = f"{facts['images']} of {facts['width']} x {facts['height']}"
    seconds = ", ".join(f"{name} {spent:.2f}" for name, spent in facts["seconds"].items())
    shown = {
        "image": f"{facts['image']} ({size})",
        "individual": facts["individual"],
        **lines,
        "graphs": "; ".join(f"{stage}: {outcome}" for stage, outcome in facts["graphs"].items()) or None,
        "seed": facts["seed"],
        "device": f"{facts['device']}, {facts['dtype']}",
        "backend": facts["backend"],
        "seconds": seconds,
    }
    return "\n".join(f"{key + ':':<12}{value}" for key, value in shown.items() if value is not None)


def _backend_name() -> str:
    from dalle2_fast.ops._build_info import LOSSES, build_info

    fused = [name for name in build_info()["fused_ops"] if name not in LOSSES]  # no image needs the losses
    return f"fused ({', '.join(fused)}), else reference" if fused else "reference (plain PyTorch)"
