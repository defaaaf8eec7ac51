"""The sizes of the published CLIPs, and small CLIPs with their configurations in other packages' formats."""

from __future__ import annotations

from pathlib import Path

import torch

from dalle2_fast import CLIP

TEXT = dict(dim_text=64, text_heads=1, text_enc_depth=2, text_seq_len=8, num_text_tokens=60, dim_latent=24)
SMALL = TEXT | dict(
    dim_image=128, visual_heads=2, visual_enc_depth=3, visual_image_size=16, visual_patch_size=8,
    mlp_ratio=1.5, visual_mlp_ratio=2.5, eos_token_id=59,
)  # fmt: skip
RESNET = TEXT | dict(
    visual_kind="resnet", visual_enc_depth=(1, 2, 1, 1), dim_image=16, visual_heads=8, visual_image_size=64,
    mlp_ratio=1.5, eos_token_id=59,
)  # fmt: skip


def small(options: dict = SMALL, **more) -> CLIP:
    torch.manual_seed(0)
    return CLIP(**options | more).eval()


def config_of_hugging_face(**more) -> dict:
    text = dict(vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                num_attention_heads=1, max_position_embeddings=8, eos_token_id=59)
    vision = dict(hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=2,
                  image_size=16, patch_size=8)
    return {"model_type": "clip", "projection_dim": 24, "text_config": text, "vision_config": vision} | more


def config_of_open_clip(**more) -> dict:
    vision = dict(image_size=16, patch_size=8, layers=3, width=128, mlp_ratio=2.5)
    text = dict(context_length=8, vocab_size=60, width=64, heads=1, layers=2, mlp_ratio=1.5)
    return dict(embed_dim=24, quick_gelu=True, vision_cfg=vision, text_cfg=text) | more


def torchscript(path: Path, state: dict[str, torch.Tensor]) -> Path:
    """A TorchScript archive of modules that hold the tensors of `state`."""

    class Holder(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    root = Holder()
    for name, value in state.items():
        *modules, last = name.split(".")
        holder = root
        for module in modules:
            if not hasattr(holder, module):
                holder.add_module(module, Holder())
            holder = getattr(holder, module)
        holder.register_buffer(last, value)
    torch.jit.trace(root, torch.zeros(1)).save(path)
    return path


Text = tuple[int, int, int]  # width, heads, layers


def vit(embed: int, width: int, layers: int, patch: int, text: Text, size: int = 224, **more) -> dict:
    return _config(embed, dict(image_size=size, layers=layers, width=width, patch_size=patch, **more), text)


def resnet(embed: int, width: int, layers: list[int], text: Text, size: int) -> dict:
    return _config(embed, dict(image_size=size, layers=layers, width=width, patch_size=None), text)


def _config(embed: int, vision: dict, text: Text) -> dict:
    width, heads, layers = text
    text_cfg = dict(context_length=77, vocab_size=49408, width=width, heads=heads, layers=layers)
    return dict(embed_dim=embed, vision_cfg=vision, text_cfg=text_cfg)


B, L, H, G = (512, 8, 12), (768, 12, 12), (1024, 16, 24), (1280, 20, 32)
# The configurations of open_clip 2.32, and the parameter counts of its models.
NAMED = {
    "ViT-B-32": (vit(512, 768, 12, 32, B), 151_277_313),
    "ViT-B-16": (vit(512, 768, 12, 16, B), 149_620_737),
    "ViT-L-14": (vit(768, 1024, 24, 14, L), 427_616_513),
    "ViT-L-14-336": (vit(768, 1024, 24, 14, L, size=336), 427_944_193),
    "ViT-H-14": (vit(1024, 1280, 32, 14, H, head_width=80), 986_109_441),
    "ViT-g-14": (vit(1024, 1408, 40, 14, H, head_width=88, mlp_ratio=4.3637), 1_366_678_273),
    "ViT-bigG-14": (vit(1280, 1664, 48, 14, G, head_width=104, mlp_ratio=4.9231), 2_539_567_105),
    "RN50": (resnet(1024, 64, [3, 4, 6, 3], B, 224), 102_007_137),
    "RN101": (resnet(512, 64, [3, 4, 23, 3], B, 224), 119_688_033),
    "RN50x4": (resnet(640, 80, [4, 6, 10, 6], (640, 10, 12), 288), 178_300_601),
    "RN50x16": (resnet(768, 96, [6, 8, 18, 8], L, 384), 290_979_217),
    "RN50x64": (resnet(1024, 128, [3, 15, 36, 10], (1024, 16, 12), 448), 623_258_305),
}
