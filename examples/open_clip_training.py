"""Train a CLIP of open_clip with our contrastive loss, which holds no N x N logits where it runs fused.

    pip install open_clip_torch
    python examples/open_clip_training.py --steps 200

Model and tokenizer are open_clip's; the loss is `dalle2_fast.ClipLoss`, or `SigLipLoss` with `--siglip`.
To run open_clip's training script with these losses, no file is needed:

    python -m dalle2_fast.adapters.open_clip --model ViT-B-32 --train-data ...
"""

from __future__ import annotations

import argparse
import math

import open_clip
import torch
from open_clip import loss as open_clip_loss

from dalle2_fast import ClipLoss, SigLipLoss
from dalle2_fast.data import SceneStream

SIZE = 32


def build_model(siglip: bool) -> open_clip.CLIP:
    """A small CLIP of open_clip; `open_clip.create_model("ViT-B-32")` makes one of the published sizes."""
    scale = dict(init_logit_scale=math.log(10), init_logit_bias=-10.0) if siglip else {}
    return open_clip.CLIP(
        embed_dim=64,
        vision_cfg=open_clip.CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=8, image_size=SIZE),
        text_cfg=open_clip.CLIPTextCfg(context_length=77, vocab_size=49408, width=64, heads=2, layers=2),
        **scale,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--siglip", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(args.siglip).to(device).train()
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    loss_of = SigLipLoss() if args.siglip else ClipLoss()
    theirs = (open_clip_loss.SigLipLoss if args.siglip else open_clip_loss.ClipLoss)()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    mean, std = (torch.tensor(values, device=device)[:, None, None]
                 for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))  # fmt: skip

    stream = SceneStream(batch_size=args.batch_size, resolutions=(SIZE,), device=device)
    for step in range(args.steps):
        batch = stream.batch(step)
        images = (batch["images"][SIZE] - mean) / std
        captions = [stream.tokenizer.decode(row) for row in batch["tokens"]]
        features = model(images, tokenizer(captions).to(device))  # image, text, scale and, for SigLIP, bias
        loss = loss_of(*features)
        if step == 0:
            difference = (loss - theirs(*features)).abs().item()
            print(f"{type(loss_of).__name__} differs from open_clip's by {difference:.1e}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
