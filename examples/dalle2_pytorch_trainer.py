"""Train in DALLE2-pytorch's DecoderTrainer: our decoder, or its own with our ops in the blocks.

    pip install dalle2-pytorch
    python examples/dalle2_pytorch_trainer.py --steps 200               # our decoder and upsampler
    python examples/dalle2_pytorch_trainer.py --steps 200 --theirs      # its Unet, patched

Optimiser, averages, checkpoints and distribution are the trainer's. Tested with dalle2-pytorch 1.15.6.
"""

from __future__ import annotations

import argparse

import dalle2_pytorch
import torch
from dalle2_pytorch.trainer import DecoderTrainer

import dalle2_fast
from dalle2_fast import DALLE2
from dalle2_fast.adapters.dalle2_pytorch import Decoder
from dalle2_fast.data import SceneStream


def their_decoder(image_embed_dim: int) -> dalle2_pytorch.Decoder:
    """A small Decoder of DALLE2-pytorch, whose norms and attention run in our ops."""
    unet = dalle2_pytorch.Unet(
        dim=32, image_embed_dim=image_embed_dim, cond_dim=64, channels=3, dim_mults=(1, 2), attn_heads=2
    )
    decoder = dalle2_pytorch.Decoder(unet=unet, image_size=64, timesteps=100, learned_variance=False)
    print(dalle2_fast.patch(decoder))
    return decoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--theirs", action="store_true", help="train DALLE2-pytorch's U-Net, patched")
    parser.add_argument("--out", help="file for the state of the trainer; none: nothing is written")
    args = parser.parse_args()

    torch.manual_seed(0)
    pipe = DALLE2.from_pretrained(dtype=torch.float32)
    clip = pipe.clip
    if args.theirs:
        decoder = their_decoder(clip.dim_latent)
    else:
        pipe.decoder.train().requires_grad_(True)
        pipe.upsampler.train().requires_grad_(True)
        decoder = Decoder(pipe.decoder, pipe.upsampler)
    trainer = DecoderTrainer(decoder, lr=args.lr)

    stream = SceneStream(batch_size=args.batch_size, resolutions=(64,), device=pipe.device)
    for step in range(args.steps):
        batch = stream.batch(step)
        images = batch["images"][64]
        with torch.no_grad():
            embed = clip.encode_image(images)
        caption = {} if args.theirs else dict(text=batch["tokens"])
        loss = trainer(images, image_embed=embed, unet_number=1, **caption)
        trainer.update(unet_number=1)
        print(f"step {step}: loss {loss:.4f}")
    if args.out:
        trainer.save(args.out)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
