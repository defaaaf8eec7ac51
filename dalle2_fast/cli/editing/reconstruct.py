"""`dalle2-fast reconstruct IMAGE`: what the first components of CLIP's embedding hold (unCLIP, section 4)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dalle2_fast.cli import arguments
from dalle2_fast.cli.image_files import MAX_COLUMNS, open_image
from dalle2_fast.cli.job import Job

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = """\
  dalle2-fast reconstruct photo.png --dims 1,4,16,64
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `dalle2-fast reconstruct`."""
    parser.add_argument("image", type=Path, help="the image to reconstruct")
    parser.add_argument(
        "--dims",
        type=_dims,
        metavar="K,K,...",
        help="numbers of components (default: 1, 4, 16, ... and all of them)",
    )
    parser.add_argument(
        "--pca-images",
        type=arguments.positive_int,
        default=2048,
        metavar="N",
        help="find the components from N images of the world that the checkpoint was trained on "
        "(default 2048)",
    )
    parser.add_argument(
        "--pca-folder", type=Path, metavar="DIR", help="find them from the images in this folder instead"
    )
    arguments.add_seed(parser)
    arguments.add_decoder(parser)
    arguments.add_upsamplers(parser)
    arguments.add_output(parser, "IMAGE-reconstructed")


def run(args: argparse.Namespace) -> int:
    """Reconstruct and write; the exit code."""
    job = Job(args, f"{args.image.stem}-reconstructed")
    opened = open_image(args.image, "image")
    files = None if args.pca_folder is None else _image_files(args.pca_folder)
    pipe = job.load()
    from dalle2_fast.data.images import resized, to_pil
    from dalle2_fast.pipeline.progress import StageTimer

    width = pipe.clip.dim_latent
    dims = args.dims or [*(4**power for power in range(8) if 4**power < width), width]
    if max(dims) > width:
        raise ValueError(f"--dims: expected numbers of up to {width} components, got {max(dims)}")
    image = job.square(opened, args.image)
    batches = None if files is None else _read(files, pipe.clip.image_size)
    timer = StageTimer(False, pipe.device)
    with timer("components"):
        pca = pipe.fit_pca(batches, count=args.pca_images, seed=job.seed)
    made = pipe.reconstruct(image, dims, pca, **job.options())
    images = to_pil(resized(image, job.size)) + to_pil(made.images)
    labels = ["source", *(f"{count}: {pca.explained(count):.1%} of variance" for count in dims)]
    texts = {"image": args.image.name, "dims": ", ".join(map(str, dims))}
    seconds = timer.seconds | made.seconds
    return job.write(images, seconds, made.graphs, texts=texts, labels=labels, columns=MAX_COLUMNS)


def _dims(text: str) -> list[int]:
    return [arguments.non_negative_int(part) for part in text.split(",")]


def _image_files(folder: Path) -> list[Path]:
    """The images of a folder, at least two, sorted by name; other files may be in it."""
    from PIL import Image

    if not folder.is_dir():
        raise NotADirectoryError(f"--pca-folder: {folder} is not a folder")
    endings = Image.registered_extensions()
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in endings)
    if len(files) < 2:
        raise ValueError(f"--pca-folder: expected at least 2 images in {folder}, found {len(files)}")
    return files


def _read(files: list[Path], side: int) -> Iterator[Tensor]:
    from dalle2_fast.data.images import central_square, from_pil, resized

    for path in files:
        yield resized(central_square(from_pil(open_image(path, "--pca-folder"))), side)
