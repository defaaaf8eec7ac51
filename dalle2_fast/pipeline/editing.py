"""What a pair (z, x_T), a CLIP image embedding and the decoder's noise, can be made to do: unCLIP, section 3.

Every picture is decoded from such a pair: variations draw many x_T for one z, interpolations and text diffs
move z along a circle, reconstructions leave components of it out, inversion finds the x_T of a given picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.data.images import as_images, as_mask, resized
from dalle2_fast.models.prior.pca import PCA
from dalle2_fast.pipeline.chain import Chain
from dalle2_fast.pipeline.generation import Generation, Progress, Run, at_least_one, choose_seed
from dalle2_fast.pipeline.slerp import slerp
from dalle2_fast.seeds import sample_seed

if TYPE_CHECKING:
    from PIL.Image import Image

    Picture = Tensor | Image | Sequence[Image]


@dataclass
class Inversion:
    """The pair that draws a picture: `pipe.decode(i.image_embed, x_T=i.x_T, steps=i.steps,
    guidance=i.guidance)`."""

    x_T: Tensor  # float32 [B, C, S, S]
    image_embed: Tensor  # [B, D]
    image: Tensor  # float32 [B, C, S, S] in [0, 1], the picture at the decoder's size
    steps: int
    guidance: float
    prompt: str | None
    seconds: dict[str, float]


class Manipulations(Chain):
    """The methods of DALLE2 that begin with a picture.

    A picture is a tensor [3, S, S] or [B, 3, S, S] in [0, 1], a PIL image or several; square, of any size.
    Keywords that are not explained are those of `generate`; the decoder's sampler is DDIM, except for
    `inpaint`. Each result depends on its inputs and the seed, not on how many others are made beside it.

    Where x_T is a picture's own, found with `inversion_steps`, guidance is 1 unless it is given: with more of
    it some pictures do not come back (benchmarks/results/inversion.json).
    """

    def embed_image(self, image: Picture) -> Tensor:
        """CLIP's embedding z of pictures, [B, D], as prior and decoder use it."""
        images = as_images("image", image, self.device)
        with torch.no_grad():
            small = resized(images, self.clip.image_size)
            return self.clip.encode_image(small, normalize=self.decoder.unit_norm)

    @torch.no_grad()
    def decode(
        self,
        image_embed: Tensor,  # [P, D]
        num_images: int = 1,
        *,
        prompt: str | Sequence[str] | None = None,
        x_T: Tensor | None = None,  # [P, C, S, S]
        eta: float = 0.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        size: int | None = None,
        batch_size: int | None = None,
        progress: Progress = False,
        **settings: Any,
    ) -> Generation:
        """Image embeddings -> `num_images` images of each: the chain without its prior.

        prompt: a caption for the decoder, or one for each embedding; None leaves the caption out.
        x_T: the noise to start from instead of the seed's own, of the decoder's size S.
        eta: of DDIM, in [0, 1]: 0 is deterministic given (z, x_T), 1 as random as DDPM.
        settings: steps, guidance, upsampler_steps and others of `generate` that are not the prior's, and
            refinements of the decoder's sampling (guidance_rescale, clip, dynamic_threshold, spacing).
        """
        self._check_embed(image_embed)
        count = len(image_embed)
        chosen, size, for_decoder = self._settings(settings, size)
        if x_T is not None:
            shape = (count, self.decoder.channels, *(self.decoder.image_size,) * 2)
            if tuple(x_T.shape) != shape:
                raise ValueError(f"x_T: expected [P, C, S, S] = {shape}, got {tuple(x_T.shape)}")
            for_decoder["x_T"] = x_T.repeat_interleave(at_least_one("num_images", num_images), dim=0)
        run = self._run(count, num_images, seed, generator, batch_size, progress)
        with run.evaluating():
            for_decoder |= self._told(run, prompt, count, num_images, chosen["negative_prompt"])
            rows = image_embed.to(self.device).repeat_interleave(num_images, dim=0)
            return self._draw(run, rows, chosen, size, sampler="ddim", eta=eta, **for_decoder)

    def variations(
        self,
        image: Picture,
        num_images: int = 4,
        *,
        eta: float = 1.0,
        inversion_steps: int | None = None,
        **options: Any,
    ) -> Generation:
        """Pictures with the content of this one: its z, decoded with DDIM and eta > 0 (section 3.1).

        inversion_steps: start from the picture's own x_T, found with so many steps, as the paper does; then
            a larger eta strays farther and eta 0 draws the picture again. None: each variation starts from
            noise of its own.
        options: those of `decode`.
        """
        images = as_images("image", image, self.device)
        found, options = self._inverted([images], inversion_steps, options)
        x_T = found[0].x_T if found else None
        made = self.decode(self.embed_image(images), num_images, x_T=x_T, eta=eta, **options)
        return _with_seconds(made, found)

    def interpolate(
        self,
        first: Picture,
        second: Picture,
        num_frames: int = 8,
        *,
        noise: str = "fixed",
        inversion_steps: int = 50,
        **options: Any,
    ) -> Generation:
        """From one picture to another in `num_frames` >= 2 pictures: z = slerp(z_1, z_2, theta), theta from 0
        to 1 (section 3.2).

        noise: "fixed" draws every frame from the seed's x_T: frames differ in content alone; "slerp" moves
            x_T, too, between those of the two pictures (inverted with `inversion_steps`), so that the ends
            are the pictures.
        options: those of `decode`.
        """
        _check_frames(num_frames)
        if noise not in ("fixed", "slerp"):
            raise ValueError(f"noise: expected 'fixed' or 'slerp', got {noise!r}")
        ends = [_one(name, as_images(name, image, self.device))
                for name, image in (("first", first), ("second", second))]  # fmt: skip
        theta = torch.linspace(0, 1, num_frames, device=self.device)
        found, options = self._inverted(ends, inversion_steps if noise == "slerp" else None, options)
        x_T = slerp(*(pair.x_T.expand(num_frames, -1, -1, -1) for pair in found), theta) if found else None
        embeds = [self.embed_image(image).expand(num_frames, -1) for image in ends]
        return _with_seconds(self.decode(slerp(*embeds, theta), x_T=x_T, **options), found)

    @torch.no_grad()
    def text_diff(
        self,
        image: Picture,
        source: str,
        target: str,
        num_frames: int = 6,
        *,
        theta: float = 0.35,
        inversion_steps: int | None = 50,
        **options: Any,
    ) -> Generation:
        """Change a picture by what `target` says and `source` does not: z = slerp(z_i, norm(z_t - z_t0), .)
        in `num_frames` >= 2 pictures from 0, the picture itself, to `theta` (section 3.3).

        theta: how far to turn, as a part of the way in [0, 1]; the paper takes 0.25 to 0.5.
        inversion_steps: of the picture's x_T, from which every frame is drawn; None: the seed's.
        options: those of `decode`.
        """
        _check_frames(num_frames)
        if not isinstance(theta, (int, float)) or isinstance(theta, bool) or not 0 <= theta <= 1:
            raise ValueError(f"theta: expected a number in [0, 1], got {theta!r}")
        images = _one("image", as_images("image", image, self.device))
        tokens = self.tokenizer.encode([source, target]).to(self.device)
        text = self.clip.encode_text(tokens, normalize=True)[0]
        text = text if text.dtype == torch.float64 else text.float()
        if torch.equal(text[0], text[1]):
            raise ValueError(f"source, target: expected captions that differ, got {source!r} twice")
        embed = self.embed_image(images)
        found, options = self._inverted([images], inversion_steps, options)
        x_T = found[0].x_T.expand(num_frames, -1, -1, -1) if found else None
        direction = F.normalize(text[1:] - text[:1], dim=-1) * embed.norm(dim=-1, keepdim=True)
        places = torch.linspace(0, theta, num_frames, device=self.device)
        z = slerp(*(end.to(text).expand(num_frames, -1) for end in (embed, direction)), places)
        return _with_seconds(self.decode(z, x_T=x_T, **options), found)

    @torch.no_grad()
    def invert(
        self,
        image: Picture,
        *,
        steps: int = 50,
        guidance: float = 1.0,
        prompt: str | None = None,
        refine: int = 0,
        batch_size: int | None = None,
        progress: Progress = False,
    ) -> Inversion:
        """A picture -> (z, x_T) by DDIM inversion, at the decoder's size (section 3).

        Decoding the pair with the same steps, guidance and prompt draws about the picture: the nearer, the
        more steps. refine: see GaussianDiffusion.invert. Guidance above 1 makes the way less exact.
        """
        images = as_images("image", image, self.device)
        self._chosen(steps=steps, guidance=guidance)
        embed = self.embed_image(images)
        small = resized(images, self.decoder.image_size)
        run = self._run(len(images), 1, 0, None, batch_size, progress)
        with run.evaluating():
            told = self._told(run, prompt, len(images), 1)
            x_T = run.batched(
                "inversion", self.decoder.invert, image=small, image_embed=embed, steps=steps,
                cond_scale=guidance, refine=refine, **told,
            )  # fmt: skip
        return Inversion(x_T, embed, small.float(), steps, guidance, prompt, run.watch.seconds)

    def reconstruct(self, image: Picture, dims: Sequence[int], pca: PCA, **options: Any) -> Generation:
        """A picture as its first components of z draw it: one picture for each number in `dims`, all from the
        same x_T (section 4, figure 7).

        dims: each 0 (the mean embedding) ... D (all of z: what `decode` makes of it). pca: see `fit_pca`.
        options: those of `decode`.
        """
        embed = self.embed_image(_one("image", as_images("image", image, self.device)))
        if len(pca.mean) != embed.shape[1]:
            raise ValueError(f"pca: expected components of {embed.shape[1]} numbers, got {len(pca.mean)}")
        if not len(dims):
            raise ValueError("dims: expected at least one number of components, got none")
        return self.decode(torch.cat([pca.truncate(embed, count) for count in dims]), **options)

    def fit_pca(
        self,
        images: Iterable[Tensor] | None = None,
        *,
        count: int = 2048,
        seed: int = 0,
        batch_size: int = 64,
    ) -> PCA:
        """Principal components of image embeddings.

        images: batches [B, 3, S, S] in [0, 1], all of which are used; None: `count` pictures of the world
            that the checkpoint was trained on (metadata["world"]), drawn by `seed`.
        """
        if images is None:
            images = self._world_pictures(at_least_one("count", count), seed, batch_size)
        with torch.no_grad():
            embeds = [self.embed_image(batch).double().cpu() for batch in images]
        if not embeds:
            raise ValueError("images: expected at least one batch, got none")
        return PCA.fit(torch.cat(embeds), unit_norm=self.decoder.unit_norm)

    @torch.no_grad()
    def inpaint(
        self,
        image: Picture,
        mask: Tensor | Image,
        prompt: str | None = None,
        num_images: int = 4,
        *,
        resample: int = 1,
        jump: int = 10,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        prior_steps: int | None = None,
        prior_guidance: float | None = None,
        sampler: str | None = None,
        size: int | None = None,
        batch_size: int | None = None,
        progress: Progress = False,
        **settings: Any,
    ) -> Generation:
        """Repaint a picture where the mask is 1 and keep it, to the bit at the size that comes out, where it
        is 0.

        mask: [S, S], [1, S, S] or [1, 1, S, S] of 0 and 1 (or bool), or a PIL image, repainted where it is
            light; of any size. prompt: of the whole picture as it is to be; None: what is kept decides, and
            the z of the picture itself. resample, jump: see GaussianDiffusion.sample; more resampling means
            fewer seams.
        sampler: of every stage, the checkpoint's by default. settings: as in `decode`.
        """
        images = _one("image", as_images("image", image, self.device))
        mask = _one("mask", as_mask("mask", mask, self.device))
        given = dict(prior_steps=prior_steps, prior_guidance=prior_guidance, sampler=sampler)
        chosen, size, for_decoder = self._settings(settings, size, **given)
        if self.decoder.channels != 3:
            raise ValueError(f"image: expected a decoder of 3 channels, got {self.decoder.channels}")
        run = self._run(1, num_images, seed, generator, batch_size, progress)
        with run.evaluating():
            for_decoder |= dict(resample=resample, jump=jump)
            if prompt is None:
                embed = self.embed_image(images).expand(num_images, -1)
                for_decoder |= self._told(run, None, 1, num_images, chosen["negative_prompt"])
            else:
                embed, told = self._prior(run, [prompt], num_images, chosen)
                for_decoder |= told
            return self._draw(run, embed, chosen, size, kept=(images, mask), **for_decoder)

    # -- pieces ----------------------------------------------------------------------------------------------

    def _settings(self, settings: dict[str, Any], size: int | None, **given: Any) -> tuple[dict, int, dict]:
        """The checkpoint's settings with those given, the size, and what is left: the decoder's."""
        mine = {name: settings[name] for name in _SETTINGS if name in settings}
        left = {name: value for name, value in settings.items() if name not in mine}
        if unknown := set(left) - _DECODER_OPTIONS:
            raise TypeError(f"{', '.join(sorted(unknown))}: not an option here")
        size = self._size(size)
        return self._chosen(size, **mine, **given), size, left

    def _run(
        self, count: int, num_images: int, seed: int | None, generator: torch.Generator | None,
        batch_size: int | None, progress: Progress,
    ) -> Run:  # fmt: skip
        at_least_one("num_images", num_images)
        seed = choose_seed(seed, generator)
        seeds = [sample_seed(seed, index) for index in range(num_images)] * count
        return Run(self, seed, seeds, batch_size=batch_size, progress=progress)

    def _told(
        self,
        run: Run,
        prompt: str | Sequence[str] | None,
        count: int,
        repeats: int,
        negative: str | None = None,
    ) -> dict[str, Any]:
        """What the decoder is told beside z. Weights trained with a caption for "none" are given that one."""
        prompt = self.sampling["negative_prompt"] if prompt is None else prompt
        if prompt is None and negative is None:
            return {}
        if prompt is None:
            return {"negative": self._captions(run, [negative] * count, repeats, negative)[1]["negative"]}
        prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
        if len(prompts) != count:
            raise ValueError(f"prompt: expected one caption or {count}, got {len(prompts)}")
        return self._captions(run, prompts, repeats, negative)[1]

    def _inverted(
        self, pictures: list[Tensor], steps: int | None, options: dict[str, Any]
    ) -> tuple[list[Inversion], dict[str, Any]]:
        """The pairs of pictures (none for None), and the options for drawing from them."""
        if steps is None:
            return [], options
        if options.get("guidance") is None:
            options = options | {"guidance": 1.0}
        names = ("guidance", "prompt", "batch_size", "progress")
        told = {name: options[name] for name in names if options.get(name) is not None}
        return [self.invert(images, steps=steps, **told) for images in pictures], options

    def _world_pictures(self, count: int, seed: int, batch_size: int) -> Iterable[Tensor]:
        from dalle2_fast.data import SceneStream, World

        if self.metadata.get("world") is None:
            raise ValueError("images: expected batches, because the checkpoint names no world, got None")
        size = self.clip.image_size
        stream = SceneStream(World.from_config(self.metadata["world"]), batch_size, (size,), seed)
        for step in range(-(-count // batch_size)):
            yield stream.batch(step)["images"][size][: count - step * batch_size].to(self.device)

    def _check_embed(self, image_embed: Tensor) -> None:
        width = self.decoder.image_embed_dim
        if not isinstance(image_embed, Tensor) or not image_embed.is_floating_point():
            came = image_embed.dtype if isinstance(image_embed, Tensor) else type(image_embed).__name__
            raise TypeError(f"image_embed: expected a floating-point tensor [P, {width}], got {came}")
        if image_embed.ndim != 2 or image_embed.shape[1] != width or not len(image_embed):
            raise ValueError(f"image_embed: expected [P >= 1, {width}], got {tuple(image_embed.shape)}")


_SETTINGS = ("steps", "guidance", "upsampler_steps", "upsampler2_steps", "tile", "negative_prompt")
_DECODER_OPTIONS = {"guidance_rescale", "clip", "dynamic_threshold", "spacing"}


def _check_frames(num_frames: int) -> None:
    if at_least_one("num_frames", num_frames) < 2:
        raise ValueError(f"num_frames: expected at least 2, got {num_frames}")


def _with_seconds(made: Generation, found: list[Inversion]) -> Generation:
    if found:
        made.seconds = {"inversion": sum(sum(pair.seconds.values()) for pair in found)} | made.seconds
    return made


def _one(name: str, rows: Tensor) -> Tensor:
    if len(rows) != 1:
        raise ValueError(f"{name}: expected one, got {len(rows)}")
    return rows
