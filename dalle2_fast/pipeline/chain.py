"""What a call of the chain is made of: its settings, captions in, image embeddings, pictures out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dalle2_fast.data.images import resized, resized_mask
from dalle2_fast.pipeline.generation import Generation, Run, at_least_one

if TYPE_CHECKING:
    from dalle2_fast.data.text.tokenizer import Tokenizer
    from dalle2_fast.models.clip.model import CLIP
    from dalle2_fast.models.decoder.model import Decoder
    from dalle2_fast.models.prior.autoregressive import ARPrior
    from dalle2_fast.models.prior.diffusion import DiffusionPrior

SAMPLERS = ("ddpm", "ddim", "dpm++")
# What a call uses when it says nothing; a checkpoint may carry its own values under "sampling" in its config.
SAMPLING = {
    "steps": 25,  # decoder
    "guidance": 3.0,  # decoder
    "candidates": 1,  # drawn for each image of a caption; the one that CLIP finds nearest to it is kept
    "prior_steps": 25,
    "prior_guidance": 1.0,
    "prior_candidates": 2,  # drawn for each image; the one closest to the caption is kept
    "negative_prompt": None,  # what guidance leads away from: no caption at all, or this one
    "upsampler_steps": 10,
    "upsampler2_steps": 15,
    "tile": None,  # the upsamplers' own sample_tile
    "sampler": "dpm++",  # of every diffusion
}
UPSAMPLERS = ("upsampler", "upsampler2")


class Chain:
    """The part of DALLE2 that runs its stages."""

    clip: CLIP
    prior: DiffusionPrior | ARPrior | None
    decoder: Decoder
    tokenizer: Tokenizer
    sampling: dict[str, Any]
    sizes: tuple[int, ...]
    device: torch.device

    def _size(self, size: int | None) -> int:
        size = self.sizes[-1] if size is None else size
        if size not in self.sizes:
            raise ValueError(f"size: expected one of {', '.join(map(str, self.sizes))}, got {size!r}")
        return size

    def _chosen(self, size: int | None = None, **given: Any) -> dict[str, Any]:
        """The checkpoint's settings, replaced by those that were given. ValueError for one of an upsampler
        that a picture of `size` does not meet: it would change nothing."""
        given = {name: value for name, value in given.items() if value is not None}
        chosen = self.sampling | given
        check_sampling(chosen)
        if size is not None:
            met = UPSAMPLERS[: self.sizes.index(size)]
            idle = {f"{stage}_steps" for stage in UPSAMPLERS if stage not in met}
            for name in (idle if met else idle | {"tile"}) & given.keys():
                which = f"no {name.removesuffix('_steps')}" if name != "tile" else "no upsampler"
                raise ValueError(f"{name}: {which} makes pictures of {size} x {size}, got {given[name]}")
        return chosen

    def _captions(
        self, run: Run, prompts: list[str], repeats: int = 1, negative: str | None = None
    ) -> tuple[dict, dict]:
        """What the prior's and the decoder's `sample` are told of captions, each `repeats` times, and of the
        one that guidance leads away from: `negative`, or else the checkpoint's."""
        negative = self.sampling["negative_prompt"] if negative is None else negative
        others = [] if negative is None else [negative]
        tokens = self.tokenizer.encode([*prompts, *others]).to(self.device)  # names unknown words
        # Weights that were trained on CLIP's raw projections want their length, too.
        unit_norm = all(net.unit_norm for net in (self.prior, self.decoder) if net is not None)
        with run.watch("text") as track:
            for _ in track(range(1), 1):
                encoded = self.clip.encode_text(tokens, normalize=unit_norm)
        rows = torch.arange(len(prompts), device=self.device).repeat_interleave(repeats)
        for_prior = {
            name: tensor[rows]
            for name, tensor in zip(("text_embed", "text_encodings", "text_mask"), encoded, strict=True)
        }
        for_decoder = dict(for_prior)
        if self.decoder.text_encoder is not None:  # it has a tower of its own
            for_decoder = {"text": tokens[rows]}
        if others:
            last = tuple(tensor[-1:] for tensor in encoded)
            for_prior = for_prior | {"negative": last}
            if self.decoder.text_encoder is not None:
                last = tokens[-1:].expand(len(rows), -1)
            for_decoder = for_decoder | {"negative": last}
        return for_prior, for_decoder

    def _need_prior(self) -> None:
        if self.prior is None:
            raise ValueError(
                "prompt: this chain has no prior to make an image embedding of it; it can only do what "
                "begins with a picture (variations, interpolate, ...)"
            )

    def _prior(
        self, run: Run, prompts: list[str], repeats: int, chosen: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Captions -> image embeddings [P * repeats, D], and what the decoder is told of the captions."""
        self._need_prior()
        for_prior, for_decoder = self._captions(run, prompts, repeats, chosen["negative_prompt"])
        if self.prior.diffuses:
            for_prior |= {"steps": chosen["prior_steps"], "sampler": chosen["sampler"]}
        image_embed = run.sample(
            "prior",
            cond_scale=chosen["prior_guidance"],
            num_samples_per_batch=chosen["prior_candidates"],
            **for_prior,
        )
        return image_embed, for_decoder

    def _draw(
        self,
        run: Run,
        image_embed: Tensor,  # [B, D]
        chosen: dict[str, Any],
        size: int,
        *,
        kept: tuple[Tensor, Tensor] | None = None,  # image [1, 3, S, S] in [0, 1], mask bool [1, 1, S, S]
        prompts: list[str] | None = None,
        **for_decoder: Any,
    ) -> Generation:
        """Image embeddings -> images: decoder and, as far as `size` asks for them, upsamplers. kept: every
        stage keeps this image where the mask is False. prompts: the rows are candidates for images of these
        captions, side by side; the best of each `candidates` goes on."""
        for_decoder = {"sampler": chosen["sampler"], "cond_scale": chosen["guidance"]} | for_decoder
        if kept is not None:
            image, mask = self._kept(kept, self.decoder.image_size, len(image_embed))
            for_decoder |= {"image": image, "mask": mask}
        low_res = images = run.sample(
            "decoder", steps=chosen["steps"], image_embed=image_embed, **for_decoder
        )
        if prompts is not None and chosen["candidates"] > 1:
            best = self._nearest(low_res, prompts, chosen["candidates"])
            images = low_res = low_res[best]
            image_embed = image_embed[best]
            run.keep(best)
        for stage, side in zip(UPSAMPLERS[: self.sizes.index(size)], self.sizes[1:], strict=False):
            for_upsampler = {}
            if kept is not None:
                image, mask = self._kept(kept, side, len(image_embed))
                for_upsampler = {"known": image * 2 - 1, "mask": mask}
            images = run.sample(
                stage,
                steps=chosen[f"{stage}_steps"],
                sampler=chosen["sampler"],
                tile=chosen["tile"],
                low_res=images,
                **for_upsampler,
            )
            if kept is not None:  # to the bit, whatever the way to [-1, 1] and back rounded
                images = torch.where(mask, images, image.to(images))
        return run.made(images, low_res, image_embed)

    def _nearest(self, images: Tensor, prompts: list[str], candidates: int) -> Tensor:
        """Of each image's candidates the row with the largest cosine between CLIP's embeddings: int64 [B]."""
        tokens = self.tokenizer.encode(prompts).to(self.device)
        text = self.clip.encode_text(tokens)[0].float()
        image = self.clip.encode_image(resized(images, self.clip.image_size)).float()
        rows = image.unflatten(0, (len(prompts), -1, candidates))
        cosine = torch.einsum("pncd,pd->pnc", rows, text)
        first = torch.arange(0, len(images), candidates, device=images.device)
        return first + cosine.argmax(dim=2).flatten()

    def _kept(self, kept: tuple[Tensor, Tensor], side: int, rows: int) -> tuple[Tensor, Tensor]:
        image, mask = resized(kept[0], side), resized_mask(kept[1], side)
        return image.expand(rows, -1, -1, -1), mask.expand(rows, -1, -1, -1)


def check_sampling(chosen: dict[str, Any]) -> None:
    for name, value in chosen.items():
        if name == "sampler":
            if value not in SAMPLERS:
                raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {value!r}")
        elif name == "negative_prompt":
            if value is not None and not isinstance(value, str):
                raise TypeError(f"negative_prompt: expected a caption, got {value!r}")
        elif name == "tile" and value is None:
            continue
        elif name.endswith("steps") or name in ("candidates", "prior_candidates", "tile"):
            at_least_one(name, value)
        elif isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {value!r}")
        elif not 0 <= value < float("inf"):
            raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
