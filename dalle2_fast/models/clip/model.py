"""CLIP: an image tower and a causal text tower, trained so that matching pairs have the largest cosine.

    logits[i, j] = exp(logit_scale) * <image_i / |image_i|, text_j / |text_j|>,
    loss = (cross_entropy(rows) + cross_entropy(columns)) / 2.

Source: CLIP, arXiv 2103.00020. Weight names are those of OpenAI's files and of open_clip's `CLIP` class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle2_fast.checkpoints.folder import CheckpointError, embedded_path
from dalle2_fast.checkpoints.formats.clip import read_clip
from dalle2_fast.checkpoints.formats.clip_keys import export
from dalle2_fast.checkpoints.hub import locate
from dalle2_fast.checkpoints.pretrained import Pretrained
from dalle2_fast.checkpoints.weights import unfilled
from dalle2_fast.data.images import check_images
from dalle2_fast.functional import contrastive_loss
from dalle2_fast.models.clip.hard_negatives import check_negatives, loss_with_negatives
from dalle2_fast.models.clip.resnet import ModifiedResNet
from dalle2_fast.models.clip.vision_transformer import VisionTransformer
from dalle2_fast.models.transformer import TextTransformer
from dalle2_fast.ops._dtypes import compute_dtype

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the images CLIP was trained on, per channel
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
LARGEST_LOGIT_SCALE = math.log(100.0)


class CLIP(TextTransformer, Pretrained):
    """CLIP. The defaults are ViT-L/14: 427,616,513 parameters.

    It *is* its text tower plus `visual`, because OpenAI's files keep the text tower's weights at top level.

    dim_latent: width of the shared embedding; dim_text, text_enc_depth, text_heads, text_seq_len,
    num_text_tokens: the text tower (text_enc_depth=None: there is none, as in image encoders alone);
    dim_image, visual_enc_depth, visual_heads, visual_image_size: the image tower, of visual_kind
      "vit"       patches of visual_patch_size pixels;
      "conv_vit"  the same behind a stem of stride-2 convolutions, for small models; patch size 2, 4, 8, ...;
      "resnet"    the modified ResNet: visual_enc_depth = blocks per stage, e.g. (3, 4, 6, 3), dim_image =
                  base width (64 for RN50), visual_heads = heads of the attention pool;
      None        no image tower: what text-to-image checkpoints keep of their CLIP.
    quick_gelu: the activation of OpenAI's weights; False for LAION's.
    eos_token_id: where a caption ends; None: at its last non-zero token.
    logit_scale_init: where log(1 / temperature) starts; it is learned, and clamped at ln 100.
    image_mean, image_std: per-channel normalisation of the images.
    """

    part = "clip"

    def __init__(
        self,
        dim_text: int = 768,
        dim_image: int = 1024,
        dim_latent: int = 768,
        num_text_tokens: int = 49408,
        text_enc_depth: int | None = 12,
        text_seq_len: int = 77,
        text_heads: int = 12,
        visual_enc_depth: int | Sequence[int] = 24,
        visual_heads: int = 16,
        visual_image_size: int = 224,
        visual_patch_size: int = 14,
        visual_kind: str | None = "vit",
        quick_gelu: bool = True,
        *,
        mlp_ratio: float = 4.0,
        visual_mlp_ratio: float = 4.0,
        eos_token_id: int | None = None,
        logit_scale_init: float = math.log(1 / 0.07),
        image_mean: Sequence[float] = OPENAI_MEAN,
        image_std: Sequence[float] = OPENAI_STD,
    ):
        if text_enc_depth is None:
            nn.Module.__init__(self)
        else:
            super().__init__(
                num_text_tokens, text_seq_len, dim_text, text_enc_depth, text_heads,
                mlp_ratio=mlp_ratio, quick_gelu=quick_gelu, eos_token_id=eos_token_id,
            )
        is_resnet = visual_kind == "resnet"
        if visual_kind not in ("vit", "conv_vit", "resnet", None):
            kinds = '"vit", "conv_vit", "resnet" or None'
            raise ValueError(f"visual_kind: expected {kinds}, got {visual_kind!r}")
        if is_resnet == isinstance(visual_enc_depth, int):
            wanted = "four stage depths, e.g. (3, 4, 6, 3)" if is_resnet else "one integer"
            raise ValueError(
                f"visual_enc_depth: expected {wanted} for {visual_kind!r}, got {visual_enc_depth!r}"
            )
        if len(image_mean) != 3 or len(image_std) != 3 or min(image_std) <= 0:
            raise ValueError(
                f"image_mean, image_std: expected 3 numbers each (std > 0), got {image_mean}, {image_std}"
            )
        self.config = dict(
            dim_text=dim_text, dim_image=dim_image, dim_latent=dim_latent, num_text_tokens=num_text_tokens,
            text_enc_depth=text_enc_depth, text_seq_len=text_seq_len, text_heads=text_heads,
            visual_enc_depth=list(visual_enc_depth) if is_resnet else visual_enc_depth,
            visual_heads=visual_heads, visual_image_size=visual_image_size,
            visual_patch_size=visual_patch_size, visual_kind=visual_kind, quick_gelu=quick_gelu,
            mlp_ratio=mlp_ratio, visual_mlp_ratio=visual_mlp_ratio, eos_token_id=eos_token_id,
            logit_scale_init=logit_scale_init, image_mean=list(image_mean), image_std=list(image_std),
        )
        self.dim_latent, self.image_size = dim_latent, visual_image_size
        self.image_mean, self.image_std = tuple(image_mean), tuple(image_std)
        if visual_kind is None:
            self.visual = None
        elif is_resnet:
            layers = tuple(visual_enc_depth)
            self.visual = ModifiedResNet(layers, dim_image, visual_heads, visual_image_size, dim_latent)
        else:
            self.visual = VisionTransformer(
                visual_image_size, visual_patch_size, dim_image, visual_enc_depth, visual_heads, dim_latent,
                mlp_ratio=visual_mlp_ratio, quick_gelu=quick_gelu, stem=visual_kind == "conv_vit",
            )
        if text_enc_depth is not None:
            self.text_projection = nn.Parameter(dim_text**-0.5 * torch.randn(dim_text, dim_latent))
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale_init)))

    def encode_image(self, images: Tensor, *, normalize: bool = True) -> Tensor:
        """Images [B, 3, S, S] in [0, 1] -> embedding [B, dim_latent] of unit norm, in the weights' dtype.

        normalize=False gives the raw projection.
        """
        if self.visual is None:
            raise ValueError("images: expected a CLIP with an image tower, got one with visual_kind=None")
        size = (self.image_size, self.image_size)
        # On a GPU, looking at the values would stall the queue at every step.
        on_cpu = isinstance(images, Tensor) and images.device.type == "cpu"
        look = on_cpu and not torch.compiler.is_compiling()
        check_images("images", images, 3, size, check_range=look)
        has_text = self.config["text_enc_depth"] is not None
        weights = self.text_projection.dtype if has_text else self.logit_scale.dtype
        # Channel by channel with plain numbers: no constant has to live on, or be copied to, the device.
        channels = zip(images.unbind(1), self.image_mean, self.image_std, strict=True)
        x = torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
        x = self.visual(x.to(weights))
        return _unit(x).to(weights) if normalize else x.to(weights)

    def encode_text(self, text: Tensor, *, normalize: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens int64 [B, L] -> (embedding [B, dim_latent], encodings [B, L, dim_text], mask bool [B, L]).

        The embedding, of unit norm, is read where the caption ends: at the first eos_token_id if the model
        has one, else at the last non-zero token; the mask is True up to there. The encodings are the hidden
        states after the final norm, zero where padded. normalize=False gives the raw projection.
        """
        self._check_text_tower("text")
        encodings, mask = self.encode_tokens(text)
        last = (mask.sum(dim=1) - 1).clamp(min=0)
        x = encodings[torch.arange(len(text), device=text.device), last] @ self.text_projection
        weights = self.text_projection.dtype
        return (_unit(x).to(weights) if normalize else x.to(weights)), encodings, mask

    def text_tower(self) -> TextTransformer:
        """A copy of the text tower alone, trainable: where a decoder's own tower can start from."""
        self._check_text_tower("text_tower")
        names = dict(num_tokens="num_text_tokens", context_length="text_seq_len", dim="dim_text",
                     depth="text_enc_depth", heads="text_heads", mlp_ratio="mlp_ratio",
                     quick_gelu="quick_gelu", eos_token_id="eos_token_id")
        tower = TextTransformer(**{name: self.config[mine] for name, mine in names.items()})
        weights = self.state_dict()
        tower.load_state_dict({name: weights[name] for name in tower.state_dict()})
        return tower.to(self.text_projection)

    def forward(
        self,
        text: Tensor,  # int64 [B, L]
        images: Tensor,  # [B, 3, S, S] in [0, 1]
        *,
        negative_text: Tensor | None = None,  # int64 [B, K, L]
        negative_mask: Tensor | None = None,  # bool [B, K], False = not applicable
        return_loss: bool = True,
    ) -> Tensor:
        """The symmetric contrastive loss (scalar), or with return_loss=False the logits [B_images, B_text].

        negative_text: captions that are wrong for their own image, and only for it: they widen that image's
        softmax row to B + K columns and leave the text -> image direction alone.
        """
        if return_loss and len(text) != len(images):
            raise ValueError(f"text: expected one caption per image = {len(images)}, got {len(text)}")
        if negative_text is not None:
            check_negatives(text, negative_text, negative_mask)
        if self.training:
            # The value is clamped, not the gradient: else a scale at the limit could never come down again.
            with torch.no_grad():
                self.logit_scale.clamp_(max=LARGEST_LOGIT_SCALE)
        scale = self.logit_scale.exp()
        image_features = self.encode_image(images)
        batch = len(text)
        if negative_text is not None and return_loss:
            text = torch.cat([text, negative_text.flatten(0, 1)])
        text_features, _, _ = self.encode_text(text)
        if not return_loss:
            return scale * image_features @ text_features.T
        if negative_text is None:
            return contrastive_loss(image_features, text_features, scale)
        text_features, negatives = text_features[:batch], text_features[batch:].unflatten(0, (batch, -1))
        return loss_with_negatives(image_features, text_features, negatives, negative_mask, scale)

    # ------------------------------------------------------------------------------------------- checkpoints

    def to_state_dict(self, layout: str = "open_clip") -> dict[str, Tensor]:
        """The weights under the names of "openai" or "open_clip" (ours, too) or "huggingface" (CLIPModel).

        Raises ValueError for another layout, and for image towers that Hugging Face's CLIP does not have.
        """
        return export(self.state_dict(), layout)

    @classmethod
    def from_pretrained(
        cls,
        path: str | PathLike | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        **options: Any,
    ) -> CLIP:
        """Load a CLIP, ours or a published one, in evaluation mode.

        path: a file of OpenAI's (a TorchScript archive, of which nothing is executed), of open_clip's or
        Hugging Face's (.pt, .bin, .safetensors, an index of shards); a folder with such a file and its
        configuration; a diffusers pipeline, for its text_encoder/ and image_encoder/; a checkpoint of ours,
        also of a DALLE2; an id of the Hugging Face hub (revision: a branch, tag or commit there); None: the
        checkpoint in the package. One tower alone, with its projection, makes a CLIP without the other.

        dtype: of the weights and of the computation, whatever the file stores.
        options: arguments of CLIP that the file and its configuration do not tell, or that you know better:
            quick_gelu, text_heads, visual_heads, image_mean, image_std.

        Raises FileNotFoundError, or CheckpointError (a ValueError) that names what is missing, left over, of
        another shape, damaged, or asked for by the configuration and not in this class.
        """
        source = read_clip(embedded_path() if path is None else locate(path, revision), **options)
        try:
            with unfilled():  # no initial weights are drawn
                clip = cls(**source.options)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{source.path}: no CLIP has this configuration ({error})") from error
        # Copies: what is read may be mapped from the file, which must not be needed any more.
        weights = {name: value.clone() for name, value in source.weights(clip.state_dict()).items()}
        clip.load_state_dict(weights, assign=True)
        return clip.to(device=device, dtype=dtype).eval()

    def _check_text_tower(self, name: str) -> None:
        if self.config["text_enc_depth"] is None:
            raise ValueError(f"{name}: expected a CLIP with a text tower, got one with text_enc_depth=None")


def _unit(x: Tensor) -> Tensor:
    """x / |x| in at least float32: a float16 norm overflows, and CLIP turns NaN in half precision."""
    return F.normalize(x.to(compute_dtype(x.dtype)), dim=-1)
