"""The stages: what each learns from a batch, how it is scored on the way, how its weights are stored."""
from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.data import SceneStream, Tokenizer, WordTokenizer, World, render
from dalle2_fast.models.clip.model import CLIP
from dalle2_fast.models.decoder.model import Decoder
from dalle2_fast.models.prior.autoregressive import ARPrior
from dalle2_fast.models.prior.diffusion import DiffusionPrior
from dalle2_fast.models.upsampler.model import Upsampler
from dalle2_fast.training.presets import Preset
from dalle2_fast.training.state import TrainingError, load_weights

MODELS: dict[str, type[nn.Module]] = {
    "clip": CLIP, "prior": DiffusionPrior, "decoder": Decoder, "upsampler": Upsampler,
    "upsampler2": Upsampler}
# Every stage draws scenes of its own: one seed must not show all of them the same pictures in the same order.
STREAMS = {"clip": 1, "prior": 2, "decoder": 3, "upsampler": 4, "held-out": 5, "upsampler2": 6}


def load_stage(out: Path, name: str, device: torch.device | str = "cpu") -> nn.Module:
    """The finished model of stage `name` under `out`: averaged weights, eval mode, no gradients."""
    path = Path(out) / name / "model.safetensors"
    if not path.exists():
        raise TrainingError(f"{path} not found: first train it: dalle2-fast train {name} --out {out}")
    config, tensors = load_weights(path)
    kinds = {None: MODELS[name], "ARPrior": ARPrior}
    if config.get("class") not in kinds:
        raise TrainingError(f"{path}: holds an unknown class of model, {config['class']!r}")
    model = kinds[config.get("class")](**config["model"])
    model.load_state_dict(tensors)
    return model.to(device).eval().requires_grad_(False)


# Made together on a GPU: 0.8 GB of pictures. While each step made its own scenes, a step of 384 of
# scenes-gpu's decoder took 135 ms on an H200, and one of 1024 of its prior, a tenth of the work, 70.
SCENES_AT_ONCE, PIXELS_AT_ONCE = 8192, 2**26


class SceneStage:
    """What the stages share: a stream of batches for training, and one small fixed batch kept out of it.

    seed: of the scenes. shards: WebDataset shards to train on instead of scenes (the held-out batch is then
    from another shuffle of the same shards); tokenizer: for them, it sizes the text towers.
    """

    name: str
    resolutions: tuple[int, ...]
    held_out_size = 64
    negatives = 0  # hard-negative captions a picture
    model: nn.Module

    def __init__(
        self, preset: Preset, *, seed: int, device: torch.device, shards: str | None, tokenizer: Tokenizer
    ) -> None:
        self.recipe, self.device, self.tokenizer = preset.recipe(self.name), device, tokenizer
        self.own_data = shards is not None
        self.prepare()
        self.config = {"model": self.model.config}
        self.model.to(device)

        def stream(batch_size: int, split: str, offset: int):
            common = dict(resolutions=self.resolutions, seed=seed * 16 + offset, device=device)
            if shards is not None:
                from dalle2_fast.data.shards import WebDatasetStream  # needs the extra "train"

                return WebDatasetStream(shards, batch_size, tokenizer=tokenizer, **common)
            at_once = 1
            if device.type != "cpu" and split == "train":
                scenes = min(SCENES_AT_ONCE, PIXELS_AT_ONCE // max(self.resolutions) ** 2)
                at_once = max(1, scenes // batch_size)
            return SceneStream(World(**preset.world), batch_size, split=split, negatives=self.negatives,
                               at_once=at_once, **common)

        self.stream = stream(self.scenes_per_batch(), "train", STREAMS[self.name])
        self.held_out = stream(self.held_out_size, "iid", STREAMS["held-out"]).batch(0)

    def prepare(self) -> None:
        """Build self.model and set self.resolutions from self.recipe."""
        raise NotImplementedError

    def fit(self) -> None:
        """Set what is computed from data rather than learned; called when the initial weights are there."""

    def scenes_per_batch(self) -> int:
        return self.recipe.optimisation.batch_size

    def batch(self, step: int) -> dict:
        return self.stream.batch(step)

    def seeds(self, count: int) -> Tensor:
        """The same noise in every sheet, so that sheets can be compared."""
        return torch.arange(count, device=self.device)

    def metrics(self) -> dict[str, float]:
        return {}

    def pictures(self) -> tuple[Tensor, int] | None:
        return None


class ClipStage(SceneStage):
    """CLIP on (image, caption, hard negatives): retrieval hides what is not bound, 2-way tests show it."""

    name = "clip"
    held_out_size = 256
    negatives = 2

    def prepare(self) -> None:
        words = dict(num_text_tokens=self.tokenizer.vocab_size, text_seq_len=self.tokenizer.context_length)
        self.model = CLIP(**self.recipe.model, **words)
        self.resolutions = (self.model.image_size,)

    def loss(self, batch: dict, generator: torch.Generator) -> Tensor:
        return self.model(batch["tokens"], batch["images"][self.model.image_size],
                          negative_text=batch.get("negatives"), negative_mask=batch.get("negative_mask"))

    def metrics(self) -> dict[str, float]:
        """top1: the right caption among the held-out ones. two_way: it beats a hard negative of its own."""
        batch = self.held_out
        image = self.model.encode_image(batch["images"][self.model.image_size])
        text = self.model.encode_text(batch["tokens"])[0]
        truth = torch.arange(len(image), device=image.device)
        scores = {"top1": ((image @ text.T).argmax(1) == truth).float().mean().item()}
        if batch.get("negatives") is not None:
            rows, count, length = batch["negatives"].shape
            wrong = self.model.encode_text(batch["negatives"].reshape(-1, length))[0].reshape(rows, count, -1)
            wins = (image * text).sum(-1, keepdim=True) > (image[:, None] * wrong).sum(-1)
            scores["two_way"] = wins[batch["negative_mask"]].float().mean().item()
        return scores


class ClipGuidedStage(SceneStage):
    """A stage that learns from the embeddings of the finished, frozen CLIP."""

    def __init__(
        self, preset: Preset, *, out: Path, device: torch.device, tokenizer: Tokenizer, **options
    ) -> None:
        self.clip = load_stage(out, "clip", device)
        if self.clip.config["num_text_tokens"] != tokenizer.vocab_size:
            raise TrainingError(
                f"{out}/clip was trained on other captions: expected a vocabulary of {tokenizer.vocab_size}, "
                f"got {self.clip.config['num_text_tokens']}; give every stage the same --data")
        super().__init__(preset, device=device, tokenizer=tokenizer, **options)

    @torch.no_grad()
    def image_embed(self, batch: dict) -> Tensor:
        return self.clip.encode_image(batch["images"][self.clip.image_size])


class PriorStage(ClipGuidedStage):
    """The diffusion prior, on embeddings standardised per dimension."""

    name = "prior"
    kind: type[nn.Module] = DiffusionPrior
    sampling = {"steps": 8}

    def fit(self) -> None:
        images = [self.image_embed(batch).float() for batch in self.statistics_batches()]
        self.model.fit_statistics(torch.cat(images))

    def statistics_batches(self) -> Iterator[dict]:
        return (self.stream.batch(step) for step in range(self.recipe.data.get("statistics_batches", 8)))

    def prepare(self) -> None:
        options, clip = dict(self.recipe.model), self.clip
        net = options.pop("net") | dict(embed_dim=clip.dim_latent, text_dim=clip.config["dim_text"],
                                        context_length=clip.context_length)
        self.model = self.kind(net=net, **options)
        self.resolutions = (clip.image_size,)

    @torch.no_grad()
    def caption(self, batch: dict) -> dict[str, Tensor]:
        return dict(zip(("text_embed", "text_encodings", "text_mask"), self.clip.encode_text(batch["tokens"]),
                        strict=True))

    def loss(self, batch: dict, generator: torch.Generator) -> Tensor:
        return self.model(**self.caption(batch), image_embed=self.image_embed(batch), generator=generator)

    def metrics(self) -> dict[str, Tensor]:
        """Mean cosine with the true image embedding: of one sample; of the text embedding, to compare."""
        caption, image = self.caption(self.held_out), self.image_embed(self.held_out)
        sampled = self.model.sample(**caption, seeds=self.seeds(len(image)), num_samples_per_batch=1,
                                    progress=False, **self.sampling)
        pairs = {"cosine": sampled, "cosine_of_text": caption["text_embed"]}
        return {name: F.cosine_similarity(x.float(), image.float()).mean() for name, x in pairs.items()}


class ARPriorStage(PriorStage):
    """The autoregressive prior, on principal components in buckets."""

    kind = ARPrior
    sampling = {}

    def __init__(self, preset: Preset, **options) -> None:
        super().__init__(preset, **options)
        self.config |= {"class": "ARPrior"}

    def fit(self) -> None:
        pairs = [(self.image_embed(batch).float(), self.caption(batch)["text_embed"].float())
                 for batch in self.statistics_batches()]
        self.model.fit(*(torch.cat(embeds) for embeds in zip(*pairs, strict=True)))


class DecoderStage(ClipGuidedStage):
    """The decoder on (image, caption, image embedding).

    text_encoder: the configuration of a text tower trained from scratch, or "clip": it starts as CLIP's.
    data["foreground_weight"] weights the error on objects: few of the pixels, but all of the shapes. Own
    pictures, in which nothing says where the objects are, are weighted evenly, and that is said.
    """

    name = "decoder"
    held_out_size = 8

    def prepare(self) -> None:
        options = dict(self.recipe.model)
        tower = options.pop("text_encoder")
        if tower == "clip":
            tower = self.clip.text_tower()
        else:
            words = dict(num_tokens=self.tokenizer.vocab_size, context_length=self.tokenizer.context_length)
            tower = tower | words
        self.model = Decoder(**options, text_encoder=tower, image_embed_dim=self.clip.dim_latent)
        self.size = self.model.image_size
        self.resolutions = tuple(dict.fromkeys((self.size, self.clip.image_size)))
        self.weight = self.recipe.data.get("foreground_weight", 1.0)
        if self.own_data and self.weight != 1.0:
            print(f"decoder: the preset's foreground_weight {self.weight:g} is for rendered scenes; the "
                  "pictures of --data are weighted evenly")
            self.weight = 1.0

    def loss(self, batch: dict, generator: torch.Generator) -> Tensor:
        pixel_weight = foreground_weight(batch, self.size, self.weight) if self.weight != 1.0 else None
        return self.model(
            batch["images"][self.size], text=batch["tokens"], image_embed=self.image_embed(batch),
            generator=generator, pixel_weight=pixel_weight, check_range=self.device.type == "cpu")

    def pictures(self) -> tuple[Tensor, int]:
        """Upper row: held-out scenes. Lower row: drawn from their captions and embeddings."""
        truth = self.held_out["images"][self.size]
        drawn = self.model.sample(self.image_embed(self.held_out), text=self.held_out["tokens"],
                                  seeds=self.seeds(len(truth)), steps=20, cond_scale=2.0, progress=False)
        return torch.cat([truth, drawn.to(truth.dtype)]), len(truth)


class UpsamplerStage(SceneStage):
    """The upsampler on aligned crops: it is fully convolutional, and one rendered scene yields several."""

    name = "upsampler"
    held_out_size = 4

    def prepare(self) -> None:
        self.model = Upsampler(**self.recipe.model)
        self.low, self.high = self.model.config["low_res_size"], self.model.config["image_size"]
        self.resolutions = (self.low, self.high)
        self.crop = self.recipe.data.get("crop", self.high)
        self.crops = self.recipe.data.get("crops_per_image", 1)
        batch_size = self.recipe.optimisation.batch_size
        if self.crop * self.low % self.high or self.crop > self.high or batch_size % self.crops:
            raise TrainingError(
                f"{self.name}: expected a crop that is a multiple of {self.high // self.low} and a batch "
                f"size that is a multiple of crops_per_image = {self.crops}, got {self.crop} and "
                f"{batch_size}")

    def scenes_per_batch(self) -> int:
        return self.recipe.optimisation.batch_size // self.crops

    def loss(self, batch: dict, generator: torch.Generator) -> Tensor:
        low, high = batch["images"][self.low], batch["images"][self.high]
        if self.crop < self.high:
            low, high = random_crops(low, high, self.crop, self.crops, generator)
        return self.model(high, low, generator=generator, check_range=self.device.type == "cpu")

    def metrics(self) -> dict[str, float]:
        """PSNR in dB against the render: of the upsampler, and of bicubic interpolation."""
        low, high = self.held_out["images"][self.low], self.held_out["images"][self.high]
        self.drawn = self.model.sample(low, seeds=self.seeds(len(low)), steps=5, progress=False)
        self.bicubic = F.interpolate(low, size=high.shape[-2:], mode="bicubic").clamp(0, 1)
        return {"psnr": psnr(self.drawn, high), "psnr_bicubic": psnr(self.bicubic, high)}

    def pictures(self) -> tuple[Tensor, int]:
        """Rows: bicubic, drawn, render."""
        return torch.cat([self.bicubic, self.drawn, self.held_out["images"][self.high]]), len(self.drawn)


class SecondUpsamplerStage(UpsamplerStage):
    """Another upsampler, on other scenes: from the first one's size to a larger one."""

    name = "upsampler2"


def foreground_weight(batch: dict, size: int, weight: float) -> Tensor:
    """[B, 1, size, size]: `weight` on objects and one pixel around them, 1 on the background.

    Objects are found as the difference between the scene and the same scene rendered without its objects.
    """
    if batch.get("scenes") is None:
        raise TrainingError("foreground_weight: expected 1 where there are no rendered scenes (--data)")
    scenes = batch["scenes"]
    empty = render(scenes | {"nobj": torch.zeros_like(scenes["nobj"])}, size)
    objects = ((batch["images"][size] - empty).abs().amax(1, keepdim=True) > 0.06).to(empty.dtype)
    return 1.0 + (weight - 1.0) * F.max_pool2d(objects, 3, stride=1, padding=1)


def random_crops(
    low: Tensor,  # [B, 3, h, w]
    high: Tensor,  # [B, 3, H, W]
    crop: int,  # in pixels of `high`
    crops: int,  # of each pair
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # [B * crops, 3, crop * h / H, crop * h / H], [B * crops, 3, crop, crop]
    """Random crops of low and high at the same place."""
    scale = high.shape[-1] // low.shape[-1]
    side, room = crop // scale, low.shape[-1] - crop // scale
    corners = torch.randint(0, room + 1, (len(low) * crops, 2), generator=generator, device=low.device)

    def cut(images: Tensor, size: int, factor: int) -> Tensor:
        inside = torch.arange(size, device=images.device)
        rows = (corners[:, 0] * factor)[:, None] + inside
        columns = (corners[:, 1] * factor)[:, None] + inside
        owner = torch.arange(len(images), device=images.device).repeat_interleave(crops)
        pixels = images.permute(0, 2, 3, 1)[owner[:, None, None], rows[:, :, None], columns[:, None, :]]
        return pixels.permute(0, 3, 1, 2)

    return cut(low, side, 1).contiguous(), cut(high, crop, scale).contiguous()


def psnr(images: Tensor, truth: Tensor) -> float:
    """Mean over images of 10 log10(1 / MSE), for values in [0, 1]."""
    error = (images.float() - truth.float()).square().mean((1, 2, 3)).clamp_min(1e-12)
    return (-10.0 / math.log(10.0) * error.log()).mean().item()


def make_stage(
    name: str,
    preset: Preset,
    *,
    out: Path,
    seed: int,
    device: torch.device,
    shards: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> SceneStage:
    """The stage `name` of `preset`; its initial weights depend on (seed, name) only.

    out: where the finished CLIP lies. tokenizer: None is the scenes'.
    """
    tokenizer = tokenizer or WordTokenizer.scenes(World(**preset.world))
    options = dict(seed=seed, device=device, shards=shards, tokenizer=tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed * 16 + STREAMS[name])
        if name in ("prior", "decoder"):
            prior = PriorStage if preset.prior_kind == "diffusion" else ARPriorStage
            return {"prior": prior, "decoder": DecoderStage}[name](preset, out=out, **options)
        stages = {"clip": ClipStage, "upsampler": UpsamplerStage, "upsampler2": SecondUpsamplerStage}
        return stages[name](preset, **options)
