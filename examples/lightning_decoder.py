"""Train our decoder in PyTorch Lightning.

    pip install lightning
    python examples/lightning_decoder.py --steps 200

The trainer does devices, DDP (`--devices 8`), precision (`--precision bf16-mixed`), checkpoints, logs.
The decoder's `forward` is its loss, so that a LightningModule has nothing else to compute.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from dalle2_fast import DALLE2
from dalle2_fast.data import SceneStream


class Scenes(IterableDataset):
    """Batches of images [B, 3, S, S] in [0, 1] and captions [B, L]: the rows of this process."""

    def __init__(self, batch_size: int, size: int, rank: int, world_size: int) -> None:
        self.size = size
        self.stream = SceneStream(
            batch_size=batch_size * world_size, resolutions=(size,), rank=rank, world_size=world_size
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        step = 0
        while True:
            batch = self.stream.batch(step)
            yield batch["images"][self.size], batch["tokens"]
            step += 1


class LitDecoder(lightning.LightningModule):
    """The decoder of the package, with its frozen CLIP for the embeddings of the images."""

    def __init__(self, lr: float, batch_size: int) -> None:
        super().__init__()
        pipe = DALLE2.from_pretrained(device="cpu", dtype=torch.float32)  # Lightning moves it
        self.decoder = pipe.decoder.train().requires_grad_(True)
        self.clip = pipe.clip.requires_grad_(False)
        self.lr, self.batch_size = lr, batch_size

    def train_dataloader(self) -> DataLoader:
        world = self.trainer.world_size, self.trainer.global_rank
        scenes = Scenes(self.batch_size, self.decoder.image_size, rank=world[1], world_size=world[0])
        return DataLoader(scenes, batch_size=None)  # the stream makes whole batches

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, text = batch
        with torch.no_grad():
            embed = self.clip.eval().encode_image(images)
        loss = self.decoder(images, text, embed.float())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.decoder.parameters(), lr=self.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4, help="of each process")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--out", default="runs/lightning")
    args = parser.parse_args()

    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        max_steps=args.steps, devices=args.devices, precision=args.precision, default_root_dir=args.out,
        log_every_n_steps=1, use_distributed_sampler=False, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(LitDecoder(args.lr, args.batch_size))
    print(f"step {trainer.global_step}: loss {trainer.callback_metrics['loss'].item():.4f}")


if __name__ == "__main__":
    main()
