"""Make the images of the README's gallery with the command line and fixed seeds.

    python docs/gallery.py                     writes docs/variations.png, docs/interpolate.png, ...
    python docs/gallery.py inpaint invert      writes only these

The source images are rendered scenes of the world on which the checkpoint was trained.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parent

# Source images of one plain object: further arguments of World, and the seed of the object's position.
SOURCES = {
    "circle": (dict(shapes=["circle"], colors=["red"], sizes=["large"], backgrounds=["navy"]), 0),
    "square": (dict(shapes=["square"], colors=["yellow"], sizes=["medium"], backgrounds=["gray"]), 3),
}
# name of the image -> command line; a word that ends with ".png" is a source image.
GALLERY = {
    "variations": ["variations", "circle.png", "--num-images", "5"],
    "interpolate": ["interpolate", "circle.png", "square.png", "--frames", "6", "--noise", "slerp"],
    "text-diff": [
        "text-diff", "square.png", "--from", "a yellow square on a gray background",
        "--to", "a yellow square on a black background", "--theta", "0.3", "--frames", "5",
    ],
    "invert": ["invert", "circle.png", "--steps", "50"],
    "reconstruct": ["reconstruct", "square.png", "--dims", "1,2,4,8,16,192"],
    "inpaint": [
        "inpaint", "circle.png", "a red circle to the left of a green square on a navy background",
        "--box", "0.5,0,1,1", "--num-images", "4",
    ],
    "init-image": [
        "generate", "a large yellow square on a navy background", "--init-image", "circle.png",
        "--strength", "0.4", "--num-images", "4",
    ],
}  # fmt: skip


def render_sources(folder: Path, size: int = 256) -> None:
    """Write every source image, as NAME.png, into the folder."""
    import torch

    from dalle2_fast.data import World, render
    from dalle2_fast.data.images import to_pil
    from dalle2_fast.data.synthetic.scenes import sample_scenes

    for name, (chosen, seed) in SOURCES.items():
        world = World(kinds=["one"], fills=["solid"], textures=["plain"], **chosen)
        scenes = sample_scenes(1, torch.Generator().manual_seed(seed), "train", world)
        to_pil(render(scenes, size))[0].save(folder / f"{name}.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(GALLERY)}; default: all")
    parser.add_argument("--checkpoint", help="a folder; default: the checkpoint in the package")
    parser.add_argument("--seed", help="of every image; default: 0, or that of its command")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the images; default: docs")
    args = parser.parse_args()
    if unknown := set(args.names) - set(GALLERY):
        parser.error(f"expected some of {', '.join(GALLERY)}, got {', '.join(sorted(unknown))}")
    from PIL import Image

    from dalle2_fast import cli
    from dalle2_fast.checkpoints.atomic import atomic_write

    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = ["--checkpoint", str(Path(args.checkpoint).resolve())] if args.checkpoint else []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        render_sources(Path())
        for name in args.names or GALLERY:
            # The same dtype on every machine, because another one gives other images.
            command, *options = GALLERY[name]
            command = [command, "--seed", "0", *options, "--dtype", "fp32"]
            command += ["--seed", args.seed] if args.seed else []
            print("dalle2-fast", *(f'"{word}"' if " " in word else word for word in command), flush=True)
            if code := cli.main([*command, *chosen, "--output", "made.png", "--quiet"]):
                return code
            with Image.open("made.png") as made, atomic_write(out / f"{name}.png") as temporary:
                made.convert("RGB").save(temporary, format="PNG", optimize=True)  # all colours
    return 0


if __name__ == "__main__":
    sys.exit(main())
