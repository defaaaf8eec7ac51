"""Train our decoder with Hugging Face Accelerate.

    pip install accelerate
    python examples/accelerate_decoder.py --steps 200
    accelerate launch --num_processes 8 --mixed_precision bf16 examples/accelerate_decoder.py --steps 200

`--state DIR` stores weights, optimiser and random numbers at the end, and goes on from what is there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from dalle2_fast import DALLE2
from dalle2_fast.data import SceneStream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4, help="of each process and micro-batch")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--state", type=Path)
    args = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=args.accumulate)
    set_seed(0, device_specific=True)  # other noise on each process
    pipe = DALLE2.from_pretrained(device=accelerator.device, dtype=torch.float32)
    clip, decoder = pipe.clip.requires_grad_(False), pipe.decoder.train().requires_grad_(True)
    size = decoder.image_size
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=args.lr)
    decoder, optimizer = accelerator.prepare(decoder, optimizer)
    if args.state and args.state.is_dir():
        accelerator.load_state(args.state)
        accelerator.print(f"goes on from {args.state}")

    stream = SceneStream(
        batch_size=args.batch_size * accelerator.num_processes, resolutions=(size,),
        device=accelerator.device, rank=accelerator.process_index, world_size=accelerator.num_processes,
    )  # fmt: skip
    for number in range(args.steps * args.accumulate):
        batch = stream.batch(number)
        images, text = batch["images"][size], batch["tokens"]
        with torch.no_grad():
            embed = clip.encode_image(images)
        with accelerator.accumulate(decoder):
            loss = decoder(images, text, embed)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(decoder.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            mean = accelerator.gather(loss.detach().reshape(1)).mean().item()
            accelerator.print(f"step {number // args.accumulate}: loss {mean:.4f}")
    if args.state:
        accelerator.save_state(args.state)
    accelerator.end_training()


if __name__ == "__main__":
    main()
