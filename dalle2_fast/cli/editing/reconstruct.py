"""`dalle2-fast reconstruct IMAGE`: what the first components of CLIP's embedding hold (unCLIP, section 4)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from dalle2_fast.cli import arguments, picture
from dalle2_fast.cli import image as cli_image
from dalle2_fast.cli.job import Job


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, help="the picture to reconstruct")
    parser.add_argument(
        "--dims", type=_dims, metavar="K,K,...",
        help="numbers of components (default: 1, 4, 16, ... and all of them)",
    )  # fmt: skip
    parser.add_argument(
        "--pca-images", type=arguments.count, default=2048, metavar="N",
        help="find the components from N pictures of the checkpoint's own world (default 2048)",
    )  # fmt: skip
    parser.add_argument(
        "--pca-folder", type=Path, metavar="DIR", help="find them from the pictures in this folder instead"
    )
    arguments.add_seed(parser)
    arguments.add_decoder(parser)
    arguments.add_upsamplers(parser)
    arguments.add_output(parser, "IMAGE-reconstructed")


def run(args: argparse.Namespace) -> int:
    job = Job(args, f"{args.image.stem}-reconstructed")
    opened = cli_image.open_image(args.image, "image")
    files = None if args.pca_folder is None else _files(args.pca_folder)
    pipe = job.load()
    from dalle2_fast.data.images import resized, to_pil

    width = pipe.clip.dim_latent
    dims = args.dims or [*(4**power for power in range(8) if 4**power < width), width]
    if max(dims) > width:
        raise ValueError(f"--dims: expected numbers of up to {width} components, got {max(dims)}")
    image = job.square(opened, args.image)
    pictures = None if files is None else _batches(files, pipe.clip.image_size)
    pca = pipe.fit_pca(pictures, count=args.pca_images, seed=job.seed)
    made = pipe.reconstruct(image, dims, pca, **job.shared())
    pictures = to_pil(resized(image, job.size)) + to_pil(made.images)
    labels = ["source", *(f"{count}: {pca.explained(count):.1%} of variance" for count in dims)]
    texts = {"image": args.image.name, "dims": ", ".join(map(str, dims))}
    return job.write(pictures, made.seconds, texts=texts, labels=labels, columns=picture.WIDEST)


def _dims(text: str) -> list[int]:
    return [arguments.count_or_none(part) for part in text.split(",")]


def _files(folder: Path) -> list[Path]:
    """The pictures of a folder by name, at least two; by their endings, so that other files may lie there."""
    from PIL import Image

    if not folder.is_dir():
        raise NotADirectoryError(f"--pca-folder: {folder} is not a folder")
    endings = Image.registered_extensions()
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in endings)
    if len(files) < 2:
        raise ValueError(f"--pca-folder: expected at least 2 pictures in {folder}, found {len(files)}")
    return files


def _batches(files: list[Path], side: int) -> Iterator:
    from dalle2_fast.data.images import from_pil, middle_square, resized

    for path in files:
        yield resized(middle_square(from_pil(cli_image.open_image(path, "--pca-folder"))), side)
