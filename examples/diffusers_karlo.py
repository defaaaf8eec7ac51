"""Draw with Karlo in diffusers' UnCLIPPipeline, with our fused ops in its networks.

    pip install diffusers transformers
    python examples/diffusers_karlo.py "a photograph of a red fox" --model kakaobrain/karlo-v1-alpha

`--model` is an id of the hub, which is downloaded, or a folder. With `--plain` nothing of ours runs; each run
prints its seconds. `DALLE2.from_pretrained(MODEL)` loads the same weights into our networks instead.
"""

from __future__ import annotations

import argparse
import time

import torch
from diffusers import PriorTransformer, UnCLIPPipeline, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

import dalle2_fast
from dalle2_fast.adapters import diffusers as ours

NETWORKS = {
    "prior": PriorTransformer,
    "text_encoder": CLIPTextModelWithProjection,
    "text_proj": UnCLIPTextProjModel,
    "decoder": UNet2DConditionModel,
    "super_res_first": UNet2DModel,
    "super_res_last": UNet2DModel,
}
SCHEDULERS = ("prior_scheduler", "decoder_scheduler", "super_res_scheduler")


def load(model: str, scheduler: type, dtype: torch.dtype) -> UnCLIPPipeline:
    """The pipeline, part by part: newer versions of diffusers do not find text_proj by Karlo's index."""
    networks = {
        name: kind.from_pretrained(model, subfolder=name, torch_dtype=dtype)
        for name, kind in NETWORKS.items()
    }
    schedulers = {name: scheduler.from_pretrained(model, subfolder=name) for name in SCHEDULERS}
    tokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer")
    return UnCLIPPipeline(tokenizer=tokenizer, **networks, **schedulers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("caption")
    parser.add_argument("--model", default="kakaobrain/karlo-v1-alpha")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--steps", type=int, default=25, help="of prior and decoder; the upsampler makes 7")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--out", help="prefix of the files; none: nothing is written")
    args = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    scheduler = UnCLIPScheduler if args.plain else ours.UnCLIPScheduler
    pipe = load(args.model, scheduler, torch.float16 if on_gpu else torch.float32)
    pipe.to("cuda" if on_gpu else "cpu")
    if not args.plain:
        print(dalle2_fast.patch(pipe))

    start = time.perf_counter()
    images = pipe(
        args.caption, num_images_per_prompt=args.images, prior_num_inference_steps=args.steps,
        decoder_num_inference_steps=args.steps, super_res_num_inference_steps=min(args.steps, 7),
        generator=torch.Generator().manual_seed(args.seed),
    ).images  # fmt: skip
    print(f"drew {len(images)} images of {images[0].size} in {time.perf_counter() - start:.1f} s")
    if args.out:
        for number, image in enumerate(images):
            image.save(f"{args.out}-{number}.png")


if __name__ == "__main__":
    main()
