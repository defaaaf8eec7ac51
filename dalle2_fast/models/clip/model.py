"""CLIP: an image tower and a causal text tower, trained so that matching pairs have the largest cosine.

    logits[i, j] = exp(logit_scale) * <image_i / |image_i|, text_j / |text_j|>,
    loss = (cross_entropy(rows) + cross_entropy(columns)) / 2.

The weights have the names of OpenAI's files and of open_clip's `CLIP` class.

Source: Radford et al., 2103.00020.
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

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean per channel of the images on which OpenAI trained CLIP."""
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation per channel of these images."""
LARGEST_LOGIT_SCALE = math.log(100.0)


class CLIP(TextTransformer, Pretrained):
    """CLIP. The defaults are ViT-L/14 with 427,616,513 parameters.

    The class *is* its text tower and has the image tower as `visual`, because OpenAI's files keep the weights
    of the text tower at top level.

    Args:
        dim_text: width of the text tower.
        dim_image: width of the image tower; for "resnet" its base width, 64 in RN50.
        dim_latent: width of the shared embedding.
        num_text_tokens: size of the vocabulary.
        text_enc_depth: the number of blocks of the text tower; None for a CLIP without one, as image encoders
            alone are.
        text_seq_len: the largest number of tokens of a caption.
        text_heads: the number of attention heads of the text tower.
        visual_enc_depth: the number of blocks of the image tower; for "resnet" the number of blocks of each
            of the four stages, e.g. (3, 4, 6, 3).
        visual_heads: the number of attention heads of the image tower; for "resnet" those of the attention
            pool.
        visual_image_size: side S of the images in pixels.
        visual_patch_size: side of a patch in pixels; for "conv_vit" a power of two >= 2. "resnet" ignores it.
        visual_kind: "vit"; "conv_vit", which has a stem of stride-2 convolutions, for small models; "resnet",
            the modified ResNet; or None for no image tower, as in the CLIPs of text-to-image checkpoints.
        quick_gelu: whether the activation is QuickGELU, as in OpenAI's weights; False for LAION's.
        mlp_ratio: width of the hidden layer of the text tower's MLPs, as a multiple of its width.
        visual_mlp_ratio: the same of the image tower.
        eos_token_id: the token that ends a caption; None: a caption ends at its last non-zero token.
        logit_scale_init: initial value of log(1 / temperature), which is learned and clamped at ln 100.
        image_mean: mean of the images per channel, which is subtracted.
        image_std: standard deviation of the images per channel, by which they are divided.

    Raises:
        ValueError: a size or a kind is impossible.

    Example:
        >>> clip = CLIP(dim_text=16, dim_image=16, dim_latent=8, num_text_tokens=10, text_enc_depth=1,
        ...             text_seq_len=6, text_heads=2, visual_enc_depth=1, visual_heads=2,
        ...             visual_image_size=16, visual_patch_size=8)
        >>> embedding, encodings, mask = clip.encode_text(torch.tensor([[3, 4, 0], [5, 6, 7]]))
        >>> embedding.shape, encodings.shape, clip.encode_image(torch.rand(2, 3, 16, 16)).shape
        (torch.Size([2, 8]), torch.Size([2, 3, 16]), torch.Size([2, 8]))
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
        """Embed images.

        Args:
            images: [B, 3, S, S] in [0, 1], S = visual_image_size.
            normalize: whether the embeddings have unit norm; False returns the raw projection.

        Returns:
            [B, dim_latent] in the dtype of the weights.

        Raises:
            TypeError, ValueError: the images have the wrong dtype or shape, or (on a CPU) values outside
                [0, 1], or there is no image tower.
        """
        if self.visual is None:
            raise ValueError("images: expected a CLIP with an image tower, got one with visual_kind=None")
        size = (self.image_size, self.image_size)
        # On a GPU, reading the values would stall the queue in every step.
        on_cpu = isinstance(images, Tensor) and images.device.type == "cpu"
        look = on_cpu and not torch.compiler.is_compiling()
        check_images("images", images, 3, size, check_range=look)
        has_text = self.config["text_enc_depth"] is not None
        weights = self.text_projection.dtype if has_text else self.logit_scale.dtype
        # Python numbers channel by channel: no constant has to be stored on the device or copied to it.
        channels = zip(images.unbind(1), self.image_mean, self.image_std, strict=True)
        x = torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
        x = self.visual(x.to(weights))
        return _unit(x).to(weights) if normalize else x.to(weights)

    def encode_text(self, text: Tensor, *, normalize: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Embed and encode captions.

        Args:
            text: token ids int64 [B, L], padded with 0.
            normalize: whether the embeddings have unit norm; False returns the raw projection.

        Returns:
            The embedding [B, dim_latent], the encodings [B, L, dim_text] and the mask bool [B, L]. The
            embedding is taken at the end of the caption: at the first eos_token_id if the model has one,
            otherwise at the last non-zero token. The mask is True up to that position. The encodings are the
            hidden states after the final norm, zero where padded.

        Raises:
            TypeError, ValueError: text has the wrong dtype or shape, or there is no text tower.
        """
        self._check_text_tower("text")
        encodings, mask = self.encode_tokens(text)
        last = (mask.sum(dim=1) - 1).clamp(min=0)
        x = encodings[torch.arange(text.shape[0], device=text.device), last] @ self.text_projection
        weights = self.text_projection.dtype
        return (_unit(x).to(weights) if normalize else x.to(weights)), encodings, mask

    def text_tower(self) -> TextTransformer:
        """A trainable copy of the text tower alone, from which the text encoder of a decoder can start.

        Raises:
            ValueError: there is no text tower.
        """
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
        """The symmetric contrastive loss, or the logits.

        Args:
            text: token ids of the captions, padded with 0.
            images: the images, of which image i belongs to caption i.
            negative_text: K captions per image that are wrong for this image. They widen the softmax row of
                the image to B + K columns and do not change the text -> image direction.
            negative_mask: False where a negative caption does not count.
            return_loss: False returns the logits; text and images may then have different lengths.

        Returns:
            The loss, a scalar, or the logits [B_images, B_text].

        Raises:
            TypeError, ValueError: an argument has the wrong dtype or shape.
        """
        if return_loss and len(text) != len(images):
            raise ValueError(f"text: expected one caption per image = {len(images)}, got {len(text)}")
        if negative_text is not None:
            check_negatives(text, negative_text, negative_mask)
        if self.training:
            # The value is clamped and not the gradient, so that a scale at the limit can still fall.
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
        """The weights under the names of another library.

        Args:
            layout: "openai" or "open_clip", which have our names, or "huggingface" (CLIPModel).

        Raises:
            ValueError: another layout, or an image tower that Hugging Face's CLIP does not have.
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

        One tower alone, with its projection, becomes a CLIP without the other tower. The bias of SigLIP's
        loss (open_clip's logit_bias) is left out, because no embedding depends on it.

        Args:
            path: one of

                - a file of OpenAI (a TorchScript archive, of which nothing is executed), of open_clip or of
                  Hugging Face (.pt, .bin, .safetensors, or an index of shards);
                - a folder with such a file and its configuration;
                - a folder of a diffusers pipeline, from which text_encoder/ and image_encoder/ are read;
                - a checkpoint of this package, also one of a whole DALLE2;
                - an id on the Hugging Face hub;
                - None, the checkpoint in the package.
            device: where the weights are wanted.
            dtype: dtype of the weights and of the computation, regardless of the dtype in the file.
            revision: a branch, tag or commit on the hub.
            options: arguments of CLIP that the file and its configuration do not contain, or that replace
                theirs: quick_gelu, text_heads, visual_heads, image_mean, image_std.

        Raises:
            FileNotFoundError: there is no such file or folder.
            CheckpointError: (a ValueError) something is missing, left over, of another shape or damaged, or
                the configuration asks for something that this class does not have. The message names it.
        """
        source = read_clip(embedded_path() if path is None else locate(path, revision), **options)
        try:
            with unfilled(source.tensors):  # draw no initial weights
                clip = cls(**source.options)
        except Exception as error:  # torch and Python raise almost any exception for values of another kind
            raise CheckpointError(f"{source.path}: no CLIP has this configuration ({error})") from error
        # The tensors are copied, because they may be mapped from the file, which may be removed later.
        weights = {name: value.clone() for name, value in source.weights(clip.state_dict()).items()}
        clip.load_state_dict(weights, assign=True)
        return clip.to(device=device, dtype=dtype).eval()

    def _check_text_tower(self, name: str) -> None:
        if self.config["text_enc_depth"] is None:
            raise ValueError(f"{name}: expected a CLIP with a text tower, got one with text_enc_depth=None")


def _unit(x: Tensor) -> Tensor:
    """x / |x| in at least float32, because a norm in float16 overflows and makes CLIP return NaN."""
    return F.normalize(x.to(compute_dtype(x.dtype)), dim=-1)
