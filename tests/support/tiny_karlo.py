"""Karlo scaled down, with random weights, built by the classes of diffusers and transformers: its folder, and
the same weights in the format of Karlo's original files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

MERGES = ("a t</w>", "i n", "t h", "th e</w>", "r e", "re d</w>", "o r", "in g</w>", "a n", "an d</w>")
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WIDTH = 64  # of CLIP's embeddings and of its text encodings, which are equal in Karlo
LENGTH = 13  # tokens of a caption


def shaken(module: nn.Module, scale: float = 0.05) -> nn.Module:
    """Random numbers added to every parameter: initial zeros and ones would hide exchanged weights."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module.eval()


def tokenizer_folder(folder: Path) -> Path:
    """A byte-pair vocabulary of ten merges in Hugging Face's format."""
    from dalle2_fast.data.text.bpe import BPETokenizer

    folder.mkdir(parents=True, exist_ok=True)
    ours = BPETokenizer(LENGTH, MERGES)
    vocabulary = {name: index for name, index in ours._ids.items() if index < ours.bos}
    vocabulary |= {BEGIN: ours.bos, END: ours.eos}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "CLIPTokenizer", "bos_token": BEGIN, "eos_token": END, "unk_token": END,
        "pad_token": END, "model_max_length": LENGTH,
    }))  # fmt: skip
    return folder


def diffusers_parts(image_size: int = 16, seed: int = 0) -> dict[str, nn.Module]:
    """The networks of an UnCLIPPipeline. The width of a head is 64, as in Karlo."""
    from diffusers import PriorTransformer, UNet2DConditionModel, UNet2DModel
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    channels = (64, 128)
    upsampler = dict(
        sample_size=2 * image_size, in_channels=6, out_channels=3, block_out_channels=channels,
        layers_per_block=1, add_attention=False, down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = dict(
            prior=PriorTransformer(
                num_attention_heads=2, attention_head_dim=64, num_layers=2, embedding_dim=WIDTH,
                num_embeddings=LENGTH,
            ),
            decoder=UNet2DConditionModel(
                sample_size=image_size, in_channels=3, out_channels=6, block_out_channels=channels,
                layers_per_block=2, cross_attention_dim=48, attention_head_dim=64,
                class_embed_type="identity", resnet_time_scale_shift="scale_shift",
                down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
                mid_block_type="UNetMidBlock2DSimpleCrossAttn",
                up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            ),
            text_proj=UnCLIPTextProjModel(
                clip_embeddings_dim=WIDTH, time_embed_dim=4 * channels[0], cross_attention_dim=48
            ),
            super_res_first=UNet2DModel(**upsampler),
            super_res_last=UNet2DModel(**upsampler | dict(sample_size=None)),
        )  # fmt: skip
        for part in parts.values():
            shaken(part)
        with torch.no_grad():
            parts["prior"].clip_std.add_(1.0)
            # If a net predicts noise ten times too large, rounding decides which bound of x0 a pixel hits, so
            # that pipelines cannot be compared. These nets predict little. The last step has no such bound.
            for name in ("decoder", "super_res_first"):
                parts[name].conv_out.weight.mul_(0.1)
    return parts


def text_encoder(seed: int = 1) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    size = 512 + len(MERGES) + 2
    config = CLIPTextConfig(
        vocab_size=size, hidden_size=WIDTH, intermediate_size=64, projection_dim=WIDTH, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=LENGTH, bos_token_id=size - 2, eos_token_id=size - 1,
        pad_token_id=size - 1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return shaken(CLIPTextModelWithProjection(config))


def image_encoder(seed: int = 2) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=64, projection_dim=WIDTH, num_hidden_layers=2,
        num_attention_heads=2, image_size=16, patch_size=8,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return shaken(CLIPVisionModelWithProjection(config))


def schedulers() -> dict[str, object]:
    """The schedulers of kakaobrain/karlo-v1-alpha."""
    from diffusers.schedulers import UnCLIPScheduler

    return dict(
        prior_scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        decoder_scheduler=UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
        super_res_scheduler=UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
    )


def pipeline(folder: Path):
    """A complete diffusers.UnCLIPPipeline; the files of its tokenizer are written to `folder`."""
    from diffusers import UnCLIPPipeline
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder(folder))
    return UnCLIPPipeline(
        **diffusers_parts(), **schedulers(), text_encoder=text_encoder(), tokenizer=tokenizer
    )


# ------------------------------------------------------------------------------------- Karlo's original files


def interleaved(*parts: Tensor, head_dim: int = 64) -> Tensor:
    """Rows [heads * head_dim] of queries, keys, ... -> [heads * parts * head_dim], head by head."""
    return torch.stack([part.unflatten(0, (-1, head_dim)) for part in parts], dim=1).flatten(0, 2)


def original_prior(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Derived from the module tree of the original, not from the loader's rules."""
    layers = {
        "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
        "clip_img_proj": "proj_in", "text_emb_proj": "embedding_proj",
        "text_enc_proj": "encoder_hidden_states_proj", "final_ln": "norm_out",
        "out_proj": "proj_to_clip_embeddings",
    }  # fmt: skip
    made = {"positional_embedding": state["positional_embedding"], "prd_emb": state["prd_embedding"]}
    for kind in ("weight", "bias"):
        for block in range(depth):
            ours, theirs = f"transformer.resblocks.{block}", f"transformer_blocks.{block}"
            made[f"{ours}.attn.c_qkv.{kind}"] = interleaved(
                *(state[f"{theirs}.attn1.to_{part}.{kind}"] for part in "qkv")
            )
            layers |= {
                f"{ours}.attn.c_proj": f"{theirs}.attn1.to_out.0", f"{ours}.ln_1": f"{theirs}.norm1",
                f"{ours}.ln_2": f"{theirs}.norm3", f"{ours}.mlp.c_fc": f"{theirs}.ff.net.0.proj",
                f"{ours}.mlp.c_proj": f"{theirs}.ff.net.2",
            }  # fmt: skip
        made |= {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for ours, theirs in layers.items()}
    return {f"model.{name}": tensor for name, tensor in made.items()}


def original_unet(unet: nn.Module) -> dict[str, Tensor]:
    """diffusers' U-Net under the names of the original, found by visiting its modules in execution order."""
    made: dict[str, Tensor] = {}

    def layer(name: str, module: nn.Module) -> None:
        made.update({f"{name}.{kind}": tensor for kind, tensor in module.state_dict().items()})

    def res(name: str, module: nn.Module) -> None:
        layer(f"{name}.in_layers.0", module.norm1)
        layer(f"{name}.in_layers.2", module.conv1)
        layer(f"{name}.emb_layers.1", module.time_emb_proj)
        layer(f"{name}.out_layers.0", module.norm2)
        layer(f"{name}.out_layers.3", module.conv2)
        if module.conv_shortcut is not None:
            layer(f"{name}.skip_connection", module.conv_shortcut)

    def attention(name: str, module: nn.Module) -> None:
        layer(f"{name}.norm", module.group_norm)
        for kind in ("weight", "bias"):
            fused = {
                "qkv": interleaved(*(getattr(getattr(module, f"to_{part}"), kind).data for part in "qkv")),
                "encoder_kv": interleaved(
                    *(getattr(getattr(module, f"add_{part}_proj"), kind).data for part in "kv")),
                "proj_out": getattr(module.to_out[0], kind).data,
            }  # fmt: skip
            for part, tensor in fused.items():
                made[f"{name}.{part}.{kind}"] = tensor[..., None] if kind == "weight" else tensor

    layer("time_embed.0", unet.time_embedding.linear_1)
    layer("time_embed.2", unet.time_embedding.linear_2)
    layer("input_blocks.0.0", unet.conv_in)
    station = 1
    for block in unet.down_blocks:
        for index, resnet in enumerate(block.resnets):
            res(f"input_blocks.{station}.0", resnet)
            if hasattr(block, "attentions"):
                attention(f"input_blocks.{station}.1", block.attentions[index])
            station += 1
        for resnet in block.downsamplers or ():
            res(f"input_blocks.{station}.0", resnet)
            station += 1
    middle = [unet.mid_block.resnets[0], *(x for x in unet.mid_block.attentions if x is not None),
              unet.mid_block.resnets[1]]
    for index, module in enumerate(middle):
        (attention if hasattr(module, "to_q") else res)(f"middle_block.{index}", module)
    station = 0
    for block in unet.up_blocks:
        for index, resnet in enumerate(block.resnets):
            res(f"output_blocks.{station}.0", resnet)
            if hasattr(block, "attentions"):
                attention(f"output_blocks.{station}.1", block.attentions[index])
            station += 1
        for resnet in block.upsamplers or ():
            res(f"output_blocks.{station - 1}.{1 + hasattr(block, 'attentions')}", resnet)
    layer("out.0", unet.conv_norm_out)
    layer("out.2", unet.conv_out)
    return made


def original_decoder(unet: nn.Module, text_proj: nn.Module) -> dict[str, Tensor]:
    layers = {
        "text_seq_proj.0": "encoder_hidden_states_proj", "text_seq_proj.1": "text_encoder_hidden_states_norm",
        "clip_tok_proj": "clip_extra_context_tokens_proj", "text_feat_proj": "embedding_proj",
        "clip_emb": "clip_image_embeddings_project_to_time_embeddings",
    }  # fmt: skip
    state = text_proj.state_dict()
    made = original_unet(unet) | {"cf_param": state["learned_classifier_free_guidance_embeddings"]}
    for ours, theirs in layers.items():
        made |= {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    return {f"model.{name}": tensor for name, tensor in made.items()}


def original_upsampler(first: nn.Module, last: nn.Module) -> dict[str, Tensor]:
    nets = {"model_first_steps": first, "model_last_step": last}
    return {f"{prefix}.{name}": x for prefix, net in nets.items() for name, x in original_unet(net).items()}


def original_files(folder: Path, parts: dict[str, nn.Module]) -> Path:
    """One .ckpt each for prior, decoder and upsampler, and the statistics, as Karlo's loader reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    prior = parts["prior"].state_dict()
    mean, std = (prior.pop(name)[0].clone() for name in ("clip_mean", "clip_std"))
    files = {
        "prior-ckpt-step=01000000-of-01000000.ckpt": original_prior(prior, 2),
        "decoder-ckpt-step=01000000-of-01000000.ckpt": original_decoder(parts["decoder"], parts["text_proj"]),
        "improved-sr-ckpt-step=1.2M.ckpt": original_upsampler(
            parts["super_res_first"], parts["super_res_last"]
        ),
    }
    for name, content in files.items():
        torch.save({"state_dict": content, "epoch": 3}, folder / name)
    torch.save((mean, std), folder / "ViT-L-14_stats.th")
    return folder


class Malicious:
    """A pickle that creates a file if its code is executed."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch '{self.proof}'",)
