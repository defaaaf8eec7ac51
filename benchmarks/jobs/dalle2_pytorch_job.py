"""The main job on DALLE2-pytorch's classes and on ours, side by side in one run on the CPU.

    pip install torch torchvision dalle2-pytorch && pip install -e .
    python -m benchmarks.jobs.dalle2_pytorch_job          writes benchmarks/results/dalle2_pytorch_job.json

Three chains make the same number of pictures of the same size with the same steps and guidance; the rows that
each net evaluates are counted and must agree:

    ours            the checkpoint in the package, whose U-Nets work on patches of pixels
    ours_plain      our classes without patches, random weights: U-Nets of DALLE2-pytorch's default shape
    dalle2_pytorch  its classes, random weights (it has no trained ones); its defaults except for sizes

Every net of the second and third has, as nearly as its widths allow, the parameters of the first. Random
weights cost the same time as trained ones; pictures are checked for shape and range only.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable

os.environ["TQDM_DISABLE"] = "1"  # DALLE2-pytorch always draws its bars

import dalle2_pytorch as theirs  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks.jobs.main_job import CAPTION  # noqa: E402
from benchmarks.timing.provenance import check_images, machine, medians, nearest, parameters, save, versions  # noqa: E402
from dalle2_fast import DALLE2, Decoder, Upsampler  # noqa: E402

# Widths of a U-Net's levels: DALLE2-pytorch's default, and a flatter one for small nets. Widths are multiples
# of 4 (its 8 groups become 4), or the sizes could not come near each other.
UNETS = [[width * level for level in levels]
         for levels in ((1, 2, 4, 8), (1, 2, 2, 4)) for width in range(8, 97, 4)]
SAMPLES = 2  # of the prior, the better of which is kept: the paper's number, both sides' default


def plain_chain(pipe: DALLE2) -> DALLE2:
    """Our classes with U-Nets of DALLE2-pytorch's shape: no patches, four levels, attention at the last."""

    def sized(cls: type[nn.Module], like: nn.Module, attention_levels: tuple[int, ...]) -> nn.Module:
        def build(channels: list[int]) -> nn.Module:
            unet = {**like.unet.config, "patch_size": 1, "channels": channels, "layers_per_block": 2,
                    "attention_levels": attention_levels, "head_dim": 16, "num_groups": 4, "embed_dim": None,
                    "grid_size": None, "fine": None}
            return cls(**{**like.config, "unet": unet})

        return nearest(build, UNETS, parameters(like))

    decoder, upsampler = sized(Decoder, pipe.decoder, (3,)), sized(Upsampler, pipe.upsampler, ())
    return DALLE2(pipe.clip, pipe.prior, decoder, upsampler, pipe.tokenizer, sampling=pipe.sampling).eval()


def their_chain(pipe: DALLE2) -> theirs.DALLE2:
    """DALLE2-pytorch's text tower, prior and two U-Nets with the parameters and steps of `pipe`."""
    width, length = pipe.clip.dim_latent, pipe.tokenizer.context_length

    def clip(depth: int) -> theirs.CLIP:
        return theirs.CLIP(dim_text=width, dim_latent=width, num_text_tokens=pipe.tokenizer.vocab_size,
                           text_seq_len=length, text_enc_depth=depth, text_heads=4, text_dim_head=width // 4,
                           dim_image=8, visual_enc_depth=1, visual_heads=1, visual_image_size=64)

    def network(depth: int) -> theirs.DiffusionPriorNetwork:
        return theirs.DiffusionPriorNetwork(dim=width, depth=depth, heads=4, dim_head=width // 4,
                                            max_text_len=length, num_timesteps=1000)

    def unet(channels: list[int], **options) -> theirs.Unet:
        # It has attention in the middle whatever one asks for.
        levels = tuple(channel // channels[0] for channel in channels)
        return theirs.Unet(dim=channels[0], dim_mults=levels, resnet_groups=4, attn_heads=4,
                           attn_dim_head=32, **options)

    def decoder_net(channels: list[int]) -> theirs.Unet:
        return unet(channels, image_embed_dim=width, text_embed_dim=width, cond_dim=width,
                    cond_on_image_embeds=True, cond_on_text_encodings=True, max_text_len=length,
                    self_attn=(False, False, False, True))

    def upsampler_net(channels: list[int]) -> theirs.Unet:
        return unet(channels, lowres_cond=True)

    text = parameters(pipe.clip) - parameters(pipe.clip.visual)
    their_clip = nearest(clip, range(1, 13), text)
    net = nearest(network, range(1, 13), parameters(pipe.prior.net))
    # Its loops take one step fewer than they are asked for in the prior, and exactly as many in the decoder.
    prior = theirs.DiffusionPrior(net, clip=their_clip, sample_timesteps=pipe.sampling["prior_steps"] + 1,
                                  cond_drop_prob=0.1)
    unets = (nearest(decoder_net, UNETS, parameters(pipe.decoder)),
             nearest(upsampler_net, UNETS, parameters(pipe.upsampler)))
    steps = (pipe.sampling["steps"], pipe.sampling["upsampler_steps"])
    decoder = theirs.Decoder(unets, clip=their_clip, image_sizes=(64, 256), learned_variance=False,
                             predict_v=True, sample_timesteps=steps)
    return theirs.DALLE2(prior=prior, decoder=decoder, prior_num_samples=SAMPLES).eval()


class Chain:
    """One of the three: a job that returns pictures, its nets (rows are counted), its clock."""

    def __init__(self, nets: dict[str, nn.Module], job: Callable[[], Tensor], seconds: dict[str, float]):
        self.nets, self.job, self.seconds = nets, job, seconds
        self.rows = dict.fromkeys(nets, 0)
        for stage, net in nets.items():
            # Our prior encodes the caption once and then calls `denoise`; DALLE2-pytorch calls `forward`
            # itself, past any hook.
            name = "denoise" if hasattr(net, "denoise") else "forward"
            setattr(net, name, self._counted(stage, getattr(net, name)))

    def _counted(self, stage: str, method: Callable) -> Callable:
        def call(x: Tensor, *args, **kwargs):
            self.rows[stage] += len(x)
            return method(x, *args, **kwargs)

        return call

    def run(self, images: int) -> dict[str, float]:
        self.rows.update(dict.fromkeys(self.rows, 0))
        self.seconds.clear()
        begin = time.perf_counter()
        made = self.job()
        total = time.perf_counter() - begin
        check_images(made.clamp(0, 1), (images, 3, 256, 256))  # DALLE2-pytorch's may leave the range a little
        return {**self.seconds, "rest": total - sum(self.seconds.values()), "total": total}


def our_chain(pipe: DALLE2, images: int) -> Chain:
    seconds: dict[str, float] = {}

    def job() -> Tensor:
        made = pipe.generate(CAPTION, images, seed=0)
        seconds.update(made.seconds)
        return made.images

    nets = {"prior": pipe.prior.net, "decoder": pipe.decoder.unet, "upsampler": pipe.upsampler.unet}
    return Chain(nets, job, seconds)


def rival_chain(chain: theirs.DALLE2, pipe: DALLE2, images: int) -> Chain:
    """Its stages are timed at the methods that `DALLE2.forward` goes through."""
    seconds: dict[str, float] = {}

    def timed(stage: Callable[..., str], method: Callable) -> Callable:
        def call(*args, **kwargs):
            inner, begin = seconds.get("text", 0.0), time.perf_counter()
            result = method(*args, **kwargs)
            name = stage(*args)
            took = time.perf_counter() - begin
            if name != "text":  # the prior encodes the caption itself
                took -= seconds.get("text", 0.0) - inner
            seconds[name] = seconds.get(name, 0.0) + took
            return result

        return call

    prior, decoder = chain.prior, chain.decoder
    for owner in (prior, decoder):
        owner.clip.embed_text = timed(lambda *args: "text", owner.clip.embed_text)
    prior.sample = timed(lambda *args: "prior", prior.sample)
    first = decoder.unets[0]
    decoder.p_sample_loop = timed(lambda unet, *args: "decoder" if unet is first else "upsampler",
                                  decoder.p_sample_loop)
    tokens = pipe.tokenizer.encode(CAPTION).expand(images, -1)
    scale, prior_scale = (pipe.sampling["guidance"], 1.0), pipe.sampling["prior_guidance"]

    def job() -> Tensor:
        made = chain(tokens, cond_scale=scale, prior_cond_scale=prior_scale)
        return made.reshape(images, *made.shape[-3:])  # of one caption it returns one picture, without B

    nets = {"prior": prior.net, "decoder": first, "upsampler": decoder.unets[1]}
    return Chain(nets, job, seconds)


def describe(channels: list[int], patch_size: int = 1, **others) -> str:
    return f"channels {'-'.join(map(str, channels))}, patch size {patch_size}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpoint", help="a folder; default: the checkpoint in the package")
    arguments = parser.parse_args()
    where, images = machine(), arguments.num_images

    torch.manual_seed(0)
    pipe = DALLE2.from_pretrained(arguments.checkpoint)
    pipe.sampling["candidates"] = 1  # DALLE2-pytorch chooses among embeddings, not among pictures
    plain, rival = plain_chain(pipe), their_chain(pipe)
    # Text tower and prior are the same modules in the first two; each chain wraps and counts its own.
    plain.prior = copy.deepcopy(pipe.prior)
    chains = {
        "ours": our_chain(pipe, images),
        "ours_plain": our_chain(plain, images),
        "dalle2_pytorch": rival_chain(rival, pipe, images),
    }
    for name, chain in chains.items():  # warms up, and checks before anything is timed
        chain.run(images)
        if name == "ours":
            wanted = dict(chain.rows)
        if chain.rows != wanted:
            raise RuntimeError(f"{name} evaluates {chain.rows} rows, ours {wanted}: not the same job")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in chains}
    for _ in range(arguments.repeats):  # in turns, so that a change of the machine's speed meets all of them
        for name, chain in chains.items():
            runs[name].append(chain.run(images))

    texts = {"ours": pipe.clip, "ours_plain": plain.clip, "dalle2_pytorch": rival.prior.clip.clip}
    towers = {"ours": pipe.clip.visual, "ours_plain": plain.clip.visual,
              "dalle2_pytorch": rival.prior.clip.clip.visual_transformer}
    wholes = {"ours": pipe, "ours_plain": plain}
    path = save("dalle2_pytorch_job", {
        "machine": where,
        "versions": versions("dalle2-pytorch", "torchvision", "numpy"),
        "job": {"caption": CAPTION, "num_images": images, "size": 256, "dtype": "float32", **pipe.sampling},
        "rows_per_net": wanted,
        "parameters": {name: {
            "text": parameters(texts[name]) - parameters(towers[name]),
            **{stage: parameters(getattr(wholes[name], stage) if name in wholes and stage != "prior" else net)
               for stage, net in chain.nets.items()},
        } for name, chain in chains.items()},
        "unets": {
            **{name: [describe(**part.unet.config) for part in (whole.decoder, whole.upsampler)]
               for name, whole in wholes.items()},
            "dalle2_pytorch": [describe([net._locals["dim"] * level for level in net._locals["dim_mults"]])
                               for net in rival.decoder.unets],
        },
        "seconds": {name: medians(runs[name]) for name in chains},
        "repeats": arguments.repeats,
    })
    print(path.read_text(), end="")


if __name__ == "__main__":
    main()
