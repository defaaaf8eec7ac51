"""The stages of `dalle2-fast distill`: those of `train` with a student as the model and another loss.

The recipe of such a stage has in its data: teacher (the folder of a pipeline), weights (the fingerprint of
the network that is distilled), steps, for the prior and the decoder guidance (the range of the weight) and
interval (where in log-SNR the teacher has guidance, or None), and method where it is not "consistency".
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dalle2_fast.data import WordTokenizer
from dalle2_fast.draws import draw
from dalle2_fast.models.captions import Caption, cat_padded
from dalle2_fast.models.decoder.encoding import encode_captions
from dalle2_fast.models.decoder.guidance import condition
from dalle2_fast.models.decoder.inpainting import kept_channels
from dalle2_fast.models.decoder.masks import draw_masks
from dalle2_fast.models.decoder.model import Decoder
from dalle2_fast.models.distilled import known_steps
from dalle2_fast.models.inputs import bernoulli
from dalle2_fast.models.prior.diffusion import DiffusionPrior
from dalle2_fast.models.upsampler.model import Upsampler
from dalle2_fast.training.distillation.loss import (
    FIRST_PHASE,
    Denoiser,
    distillation_loss,
    gap,
    per_sample,
    training_times,
)
from dalle2_fast.training.distillation.matching import distribution_loss, is_students_turn
from dalle2_fast.training.distillation.student import check_teacher, fingerprint, load_teacher, make_student
from dalle2_fast.training.errors import TrainingError
from dalle2_fast.training.recipes import Preset
from dalle2_fast.training.run_folder.record import describe_tokenizer
from dalle2_fast.training.stages.base import SceneStage
from dalle2_fast.training.stages.decoder import DecoderStage
from dalle2_fast.training.stages.prior import PriorStage
from dalle2_fast.training.stages.protocol import Validation
from dalle2_fast.training.stages.source import Source
from dalle2_fast.training.stages.upsampler import UpsamplerStage


class Networks(NamedTuple):
    """Data and networks with the conditions of a batch filled in."""

    x0: Tensor
    student: Denoiser
    teacher: Denoiser
    follower: Denoiser | None  # of the method "dmd2"


class DistilledStage(SceneStage):
    """A student and its teacher. A subclass defines `networks` and what `SceneStage` asks for.

    With the method "dmd2" a third network follows the student (`matching`). It is a part of the model that is
    trained, and therefore of the saved state, but not of the published weights.
    """

    clip_x0: float | None = 1.0  # bound on a predicted x0, as in sampling

    def __init__(self, preset: Preset, source: Source, *, out: Path) -> None:
        options = preset.recipe(self.name).data
        self.pipe = load_teacher(options["teacher"], source.device)
        self.clip, self.teacher = self.pipe.clip, check_teacher(self.pipe, self.name)
        if fingerprint(self.teacher) != options["weights"]:
            raise TrainingError(f"--teacher: {options['teacher']} has changed since this run began")
        words = self.pipe.tokenizer if source.shards is not None else WordTokenizer.scenes(source.world)
        if describe_tokenizer(words) != describe_tokenizer(self.pipe.tokenizer):
            raise TrainingError(
                f"--teacher: {options['teacher']} has another tokenizer than the scenes of its world; give "
                "it shards with --data"
            )
        self.guidance, self.interval = options.get("guidance"), options.get("interval")
        super().__init__(preset, source, out=out)

    def build_model(self) -> nn.Module:
        guidance = None if self.guidance is None else tuple(self.guidance)
        student = make_student(self.teacher, self.recipe.data["steps"], guidance)
        if self.recipe.data.get("method") == "dmd2":
            student.follower = deepcopy(self.teacher).requires_grad_(True)
        return student

    @property
    def follower(self) -> nn.Module | None:
        """The network that follows the student, if the method has one."""
        return getattr(self.model, "follower", None)

    def published(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The student's."""
        return {name: value for name, value in weights.items() if not name.startswith("follower.")}

    def why_not_captured(self) -> str | None:
        return "its loss is not the same in every step"

    def batch(self, step: int) -> dict:
        """The batch of the stream, "gap": the length of the teacher's steps, and whose turn it is."""
        progress = step / self.recipe.optimisation.steps
        first_phase = 0.0 if self.guidance is None else FIRST_PHASE
        facts = {"gap": gap(min(progress, 1.0), first_phase), "students_turn": is_students_turn(step)}
        return super().batch(step) | facts

    def held_out_loss(self, generator: torch.Generator) -> Tensor:
        return self.loss(self.held_out | {"gap": gap(1.0, FIRST_PHASE), "students_turn": False}, generator)

    def loss(self, batch: dict, generator: torch.Generator) -> Tensor:
        x0, student, teacher, follower = self.networks(batch, generator)
        diffusion, steps = self.model.diffusion, self.model.consistency_steps
        noise = draw(torch.randn, x0.shape, generator, device=x0.device)
        if follower is not None:
            known = known_steps(steps)
            steps = known[int(torch.randint(len(known), (), generator=generator, device=generator.device))]
            return distribution_loss(
                diffusion, student, teacher, follower, noise, generator, steps=steps,
                students_turn=batch["students_turn"], clip=self.clip_x0,
            ).mean()  # fmt: skip
        t = training_times(diffusion, len(x0), steps, generator, x0.device)
        return distillation_loss(
            diffusion, student, teacher, x0, t=t, noise=noise, g=batch["gap"], clip=self.clip_x0
        ).mean()

    def networks(self, batch: dict, generator: torch.Generator) -> Networks:
        """The data x0, and the networks with the conditions of this batch filled in."""
        raise NotImplementedError

    def with_follower(
        self, x0: Tensor, conditional: Callable[[nn.Module], Denoiser], teacher: Denoiser
    ) -> Networks:
        """The networks; conditional(network) makes student and follower functions to x0."""
        follower = None if self.follower is None else conditional(self.follower)
        return Networks(x0, conditional(self.model), teacher, follower)

    def draw_weights(self, batch: int, generator: torch.Generator) -> Tensor:
        """Guidance weights [batch], uniform in their range."""
        low, high = self.guidance
        return low + (high - low) * draw(torch.rand, (batch,), generator, device=self.device)

    def x0_of(self, network: nn.Module, net: Callable[[Tensor, Tensor], Tensor]) -> Denoiser:
        """net(x, time), called as a network of this process, as a function to x0."""
        diffusion = network.diffusion

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            output = net(diffusion.network_input(x_t, t), diffusion.schedule.net_time(t))
            return diffusion.predict_x0(x_t, t, diffusion.split_output(output, x_t)[0])

        return denoise

    def guided(self, net: Callable[[Tensor, Tensor], Tensor], weights: Tensor) -> Denoiser:
        """net(x, time), which returns conditional and then unconditional rows, as a function to x0."""
        diffusion = self.teacher.diffusion

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            output = net(diffusion.network_input(x_t, t), diffusion.schedule.net_time(t))
            conditional, unconditional = (
                diffusion.split_output(rows, x_t)[0] for rows in output.chunk(2)
            )
            weight = weights
            if self.interval is not None:
                log_snr = diffusion.schedule.log_snr(t)
                inside = (log_snr >= self.interval[0]) & (log_snr < self.interval[1])
                weight = torch.where(inside, weights, 1.0)
            output = unconditional + per_sample(weight, x_t) * (conditional - unconditional)
            return diffusion.predict_x0(x_t, t, output)

        return denoise

    def keep(self, batch: int, probability: float, generator: torch.Generator) -> Tensor:
        """bool [batch]: where training with this probability of dropping keeps a condition."""
        return ~bernoulli(batch, probability, self.device, generator)

    def negative_tokens(self) -> Tensor | None:
        """The caption that the teacher's guidance leads away from, int64 [1, L]."""
        prompt = self.pipe.sampling["negative_prompt"]
        return None if prompt is None else self.pipe.tokenizer.encode([prompt]).to(self.device)

    def encode_text(self, tokens: Tensor, network: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """Embedding, encodings and mask of CLIP, as the network takes them."""
        return self.clip.encode_text(tokens, normalize=network.unit_norm)


class DecoderDistillation(DistilledStage):
    """A decoder: image embeddings, captions and the guidance weight are conditions of the student."""

    name, model_classes = DecoderStage.name, (Decoder,)
    stream_number, held_out_size = DecoderStage.stream_number, DecoderStage.held_out_size

    @property
    def resolutions(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((self.teacher.image_size, self.clip.image_size)))

    def networks(self, batch: dict, generator: torch.Generator) -> Networks:
        student, teacher = self.model, self.teacher
        x0 = batch["images"][teacher.image_size] * 2 - 1
        rows = len(x0)
        embed = self.image_embed(batch)
        negative = self.negative_tokens()
        keep_image = self.keep(rows, teacher.image_cond_drop_prob, generator)
        keep_text = self.keep(rows, teacher.text_cond_drop_prob, generator)
        nothing, weights = torch.zeros_like(keep_image), self.draw_weights(rows, generator)
        extra = None
        if teacher.inpaint:
            mask = draw_masks(rows, *x0.shape[2:], device=x0.device, generator=generator)
            extra = kept_channels(x0, mask)

        def conditions(network: Decoder) -> tuple[Tensor, Tensor, Tensor]:
            caption, kept = self.captions(network, batch["tokens"], rows), keep_text
            if negative is not None:
                caption = chosen(caption, self.captions(network, negative, 1), keep_text)
                kept = ~nothing
            return condition(network, rows, embed, caption, keep_image, kept)

        def with_extra(x: Tensor) -> Tensor:
            return x if extra is None else torch.cat([x, extra.to(x.dtype)], dim=1)

        def conditional(network: Decoder) -> Denoiser:
            context, mask, classes = conditions(network)
            if network is student:
                classes = classes + student.guidance_input(weights)
            return self.x0_of(
                network, lambda x, time: network.unet(with_extra(x), time, context, classes, mask)
            )

        with torch.no_grad():
            without = None if negative is None else self.captions(teacher, negative, 1).expand(rows)
            pairs = zip(
                conditions(teacher), condition(teacher, rows, embed, without, nothing, ~nothing), strict=True
            )
            both_context, both_mask, both_classes = (cat_padded(*pair) for pair in pairs)

        def teacher_net(x: Tensor, time: Tensor) -> Tensor:
            x, time = torch.cat([with_extra(x)] * 2), torch.cat([time] * 2)
            return teacher.unet(x, time, both_context, both_classes, both_mask)

        return self.with_follower(x0, conditional, self.guided(teacher_net, weights))

    @torch.no_grad()
    def image_embed(self, batch: dict) -> Tensor:
        """CLIP's embeddings of the images, [B, D]."""
        images = batch["images"][self.clip.image_size]
        return self.clip.encode_image(images, normalize=self.teacher.unit_norm)

    def captions(self, decoder: Decoder, tokens: Tensor, rows: int) -> Caption:
        """Captions as this decoder encodes them."""
        if decoder.text_encoder is not None:
            return encode_captions(decoder, rows, tokens, None, None, None)
        embed, encodings, mask = self.encode_text(tokens, decoder)
        return encode_captions(decoder, rows, None, encodings, mask, embed)

    def measure(self) -> Validation:
        """Rows of images: held-out scenes, the student's from their captions and embeddings."""
        truth, tokens = self.held_out["images"][self.teacher.image_size], self.held_out["tokens"]
        captions: dict = {"text": tokens}
        if self.model.text_encoder is None:
            names = ("text_embed", "text_encodings", "text_mask")
            captions = dict(zip(names, self.encode_text(tokens, self.model), strict=True))
        sampled = self.model.sample(
            self.image_embed(self.held_out), **captions, seeds=self.fixed_seeds(len(truth)),
            cond_scale=sum(self.guidance) / 2, progress=False,
        )  # fmt: skip
        return Validation({}, torch.cat([truth, sampled.to(truth.dtype)]), columns=len(truth))


class PriorDistillation(DistilledStage):
    """A diffusion prior: captions and the guidance weight are conditions of the student."""

    name, model_classes = PriorStage.name, (DiffusionPrior,)
    stream_number, held_out_size = PriorStage.stream_number, PriorStage.held_out_size

    def build_model(self) -> nn.Module:
        self.clip_x0 = self.teacher.sample_clip
        return super().build_model()

    @property
    def resolutions(self) -> tuple[int, ...]:
        return (self.clip.image_size,)

    def networks(self, batch: dict, generator: torch.Generator) -> Networks:
        student, teacher, tokens = self.model, self.teacher, batch["tokens"]
        rows, negative = len(tokens), self.negative_tokens()
        with torch.no_grad():
            images = batch["images"][self.clip.image_size]
            x0 = teacher.standardised(self.clip.encode_image(images, normalize=teacher.unit_norm))
            caption = Caption(*self.encode_text(tokens, teacher))
            keep = self.keep(rows, teacher.cond_drop_prob, generator)
            if negative is None:
                kept, without = (teacher.condition(caption, some) for some in (keep, torch.zeros_like(keep)))
            else:
                other, every = Caption(*self.encode_text(negative, teacher)), torch.ones_like(keep)
                kept = teacher.condition(chosen(caption, other, keep), every)
                without = teacher.condition(other.expand(rows), every)
            both = kept.followed_by(without)
        weights = self.draw_weights(rows, generator)

        def conditional(network: DiffusionPrior) -> Denoiser:
            offset = student.guidance_input(weights) if network is student else None
            return self.x0_of(
                network,
                lambda x, time: network.net(
                    x, time, kept.embed, kept.encodings, kept.mask, offset
                ).to(x.dtype),
            )

        def teacher_net(x: Tensor, time: Tensor) -> Tensor:
            x, time = torch.cat([x] * 2), torch.cat([time] * 2)
            return teacher.net(x, time, both.embed, both.encodings, both.mask).to(x.dtype)

        return self.with_follower(x0, conditional, self.guided(teacher_net, weights))

    def measure(self) -> Validation:
        """Mean cosine similarity of a sample to the true image embedding."""
        names = ("text_embed", "text_encodings", "text_mask")
        captions = dict(zip(names, self.encode_text(self.held_out["tokens"], self.model), strict=True))
        images = self.held_out["images"][self.clip.image_size]
        truth = self.clip.encode_image(images, normalize=self.model.unit_norm)
        sampled = self.model.sample(
            **captions, seeds=self.fixed_seeds(len(truth)), num_samples_per_batch=1,
            cond_scale=sum(self.guidance) / 2, progress=False,
        )  # fmt: skip
        cosine = torch.nn.functional.cosine_similarity(sampled.float(), truth.float())
        return Validation({"cosine": cosine.mean().item()})


class UpsamplerDistillation(DistilledStage):
    """An upsampler, which has no guidance. One without attention is distilled on crops of a quarter side."""

    name, model_classes = UpsamplerStage.name, (Upsampler,)
    stream_number, held_out_size = UpsamplerStage.stream_number, UpsamplerStage.held_out_size
    sampling_steps = None  # those of the student
    sampled = None
    measure = UpsamplerStage.measure

    def build_model(self) -> nn.Module:
        self.low, self.high = self.teacher.low_res_size, self.teacher.image_size
        self.crop = None if self.teacher.unet.config["attention_levels"] else 0.25
        return super().build_model()

    @property
    def resolutions(self) -> tuple[int, ...]:
        return self.low, self.high

    def networks(self, batch: dict, generator: torch.Generator) -> Networks:
        x0, enlarged, level, _ = self.teacher.training_pair(
            batch["images"][self.high], batch["images"][self.low], crop=self.crop, generator=generator,
            check_range=self.device.type == "cpu",
        )  # fmt: skip

        def denoiser(network: Upsampler) -> Denoiser:
            return self.x0_of(
                network, lambda x, time: network.predict(network.unet, x, time, enlarged, level)
            )

        return self.with_follower(x0, denoiser, denoiser(self.teacher))


def chosen(caption: Caption, other: Caption, keep: Tensor) -> Caption:
    """Row i of `caption` [B] where keep[i] is True, the one caption `other` elsewhere.

    Example:
        >>> a, b = (Caption(torch.full((rows, 2), float(rows))) for rows in (2, 1))
        >>> chosen(a, b, torch.tensor([True, False])).embed
        tensor([[2., 2.],
                [1., 1.]])
    """
    rows = torch.arange(len(keep), device=keep.device)
    both = caption.followed_by(other.expand(len(keep)))
    rows = torch.where(keep, rows, rows + len(keep))
    return Caption(*(None if x is None else x[rows] for x in (both.embed, both.encodings, both.mask)))


DISTILLED: dict[str, type[DistilledStage]] = {
    each.name: each for each in (DecoderDistillation, PriorDistillation, UpsamplerDistillation)
}
