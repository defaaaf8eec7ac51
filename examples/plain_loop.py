"""Tune the decoder of the package in a plain PyTorch loop, and draw with the result.

    python examples/plain_loop.py --steps 200 --out tuned
    dalle2-fast generate "a small red star on a navy background" --checkpoint tuned

Needs dalle2_fast alone. The images are rendered scenes; for yours, replace `batches` by a loader of images in
[0, 1] and of captions that `pipe.tokenizer` encodes. `dalle2-fast train` does this and more; this file is for
those who have a loop.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dalle2_fast import DALLE2
from dalle2_fast.data import SceneStream


def batches(steps: int, batch_size: int, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Images float32 [B, 3, size, size] in [0, 1] and captions int64 [B, L]."""
    stream = SceneStream(batch_size=batch_size, resolutions=(size,), device=device)
    for step in range(steps):
        batch = stream.batch(step)
        yield batch["images"][size], batch["tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder for the tuned pipeline; none: nothing is written")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    pipe = DALLE2.from_pretrained(dtype=torch.float32)  # on a GPU if there is one
    decoder = pipe.decoder.train().requires_grad_(True)
    average = AveragedModel(decoder, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=args.lr)
    size = decoder.image_size

    for step, (images, text) in enumerate(batches(args.steps, args.batch_size, size, pipe.device)):
        with torch.no_grad():  # CLIP is frozen
            embed = pipe.clip.encode_image(images)
        loss = decoder(images, text, embed)  # forward is the loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(decoder)
        print(f"step {step}: loss {loss.item():.4f}")

    decoder.load_state_dict(average.module.state_dict())
    decoder.eval().requires_grad_(False)
    images = pipe("a large red circle on a navy background", num_images=1, seed=args.seed)
    print(f"drew {tuple(images.shape)}")
    if args.out:
        print(f"wrote {pipe.save_pretrained(args.out)}")


if __name__ == "__main__":
    main()
