"""Train a U-Net of diffusers with our fused ops in its blocks, and draw with diffusers' pipeline.

    pip install diffusers
    python examples/diffusers_unet.py --steps 500 --out circles

The loop and the pipeline are those of diffusers. Two lines are ours: `patch(unet)`, which swaps the blocks in
place, and the scheduler, whose step is one kernel. What `--out` writes is loaded by `DDPMPipeline` alone.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DDPMPipeline, UNet2DModel
from torch.nn import functional as F

import dalle2_fast
from dalle2_fast.adapters.diffusers import DDPMScheduler
from dalle2_fast.data import SceneStream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--out", help="folder for the pipeline; none: nothing is written")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet = UNet2DModel(
        sample_size=args.size, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).to(device)  # fmt: skip
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    noisy = torch.randn(1, 3, args.size, args.size, device=device)
    with torch.no_grad():
        before = unet(noisy, 500).sample

    report = dalle2_fast.patch(unet)

    with torch.no_grad():
        difference = (unet(noisy, 500).sample - before).abs().max().item()
    print(f"{len(report.swapped)} modules run fused; the prediction changes by at most {difference:.1e}")

    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.lr)
    stream = SceneStream(batch_size=args.batch_size, resolutions=(args.size,), device=device)
    for step in range(args.steps):
        images = stream.batch(step)["images"][args.size] * 2 - 1
        noise = torch.randn_like(images)
        timesteps = torch.randint(1000, (len(images),), device=device)
        loss = F.mse_loss(unet(scheduler.add_noise(images, noise, timesteps), timesteps).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")

    pipe = DDPMPipeline(unet=unet.eval(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe(4, generator, num_inference_steps=args.sampling_steps).images
    print(f"drew {len(images)} images of {images[0].size}")
    if args.out:
        dalle2_fast.unpatch(unet)
        pipe.save_pretrained(args.out)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
