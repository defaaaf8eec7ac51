"""Pipelines with the size of a given one: of our classes without patches, and of DALLE2-pytorch's classes."""

from __future__ import annotations

from torch import nn

from benchmarks.cases.sizes import nearest_in_size, parameter_count
from dalle2_fast import DALLE2, Decoder, Upsampler

# Channels of a U-Net's levels: multipliers of DALLE2-pytorch's default, and flatter ones for small nets. The
# widths are multiples of 4 (with 4 groups instead of its 8), so that the parameter counts can come close.
UNETS = [[width * level for level in levels]
         for levels in ((1, 2, 4, 8), (1, 2, 2, 4)) for width in range(8, 97, 4)]
PRIOR_CANDIDATES = 2  # the better of which is kept: the number of the paper, and the default of both sides


def plain_pipeline(pipe: DALLE2) -> DALLE2:
    """Our classes with U-Nets of DALLE2-pytorch's shape: no patches, four levels, attention at the last."""

    def sized(cls: type[nn.Module], like: nn.Module, attention_levels: tuple[int, ...]) -> nn.Module:
        def build(channels: list[int]) -> nn.Module:
            unet = {**like.unet.config, "patch_size": 1, "channels": channels, "layers_per_block": 2,
                    "attention_levels": attention_levels, "head_dim": 16, "num_groups": 4, "embed_dim": None,
                    "grid_size": None, "fine": None}
            return cls(**{**like.config, "unet": unet})

        return nearest_in_size(build, UNETS, parameter_count(like))

    decoder, upsampler = sized(Decoder, pipe.decoder, (3,)), sized(Upsampler, pipe.upsampler, ())
    return DALLE2(pipe.clip, pipe.prior, decoder, upsampler, pipe.tokenizer, sampling=pipe.sampling).eval()


def their_pipeline(pipe: DALLE2) -> nn.Module:
    """DALLE2-pytorch's text tower, prior and two U-Nets with the parameter counts and steps of `pipe`."""
    import dalle2_pytorch as theirs

    width, length = pipe.clip.dim_latent, pipe.tokenizer.context_length

    def clip(depth: int) -> nn.Module:
        return theirs.CLIP(dim_text=width, dim_latent=width, num_text_tokens=pipe.tokenizer.vocab_size,
                           text_seq_len=length, text_enc_depth=depth, text_heads=4, text_dim_head=width // 4,
                           dim_image=8, visual_enc_depth=1, visual_heads=1, visual_image_size=64)

    def network(depth: int) -> nn.Module:
        return theirs.DiffusionPriorNetwork(dim=width, depth=depth, heads=4, dim_head=width // 4,
                                            max_text_len=length, num_timesteps=1000)

    def unet(channels: list[int], **options) -> nn.Module:
        # It always has attention in the middle block.
        levels = tuple(channel // channels[0] for channel in channels)
        return theirs.Unet(dim=channels[0], dim_mults=levels, resnet_groups=4, attn_heads=4,
                           attn_dim_head=32, **options)

    def decoder_net(channels: list[int]) -> nn.Module:
        return unet(channels, image_embed_dim=width, text_embed_dim=width, cond_dim=width,
                    cond_on_image_embeds=True, cond_on_text_encodings=True, max_text_len=length,
                    self_attn=(False, False, False, True))

    def upsampler_net(channels: list[int]) -> nn.Module:
        return unet(channels, lowres_cond=True)

    text = parameter_count(pipe.clip) - parameter_count(pipe.clip.visual)
    their_clip = nearest_in_size(clip, range(1, 13), text)
    net = nearest_in_size(network, range(1, 13), parameter_count(pipe.prior.net))
    # Its prior runs one step fewer than requested, its decoder exactly as many.
    prior = theirs.DiffusionPrior(net, clip=their_clip, sample_timesteps=pipe.sampling["prior_steps"] + 1,
                                  cond_drop_prob=0.1)
    unets = (nearest_in_size(decoder_net, UNETS, parameter_count(pipe.decoder)),
             nearest_in_size(upsampler_net, UNETS, parameter_count(pipe.upsampler)))
    steps = (pipe.sampling["steps"], pipe.sampling["upsampler_steps"])
    decoder = theirs.Decoder(unets, clip=their_clip, image_sizes=(64, 256), learned_variance=False,
                             predict_v=True, sample_timesteps=steps)
    return theirs.DALLE2(prior=prior, decoder=decoder, prior_num_samples=PRIOR_CANDIDATES).eval()
