"""The U-Net of guided-diffusion: ours, with an embedding of classes and a width of the sines of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dalle2_fast.models import UNet
from dalle2_fast.models.unet import ContextCache


class AdmUNet(UNet):
    """`UNet` with two options of guided-diffusion's: class labels, and a width of the sinusoidal embedding.

    Args:
        num_classes: the number of classes; class_labels are then int64 [B]. None: as in `UNet`.
        time_dim: width of the sinusoidal embedding of the time; None is channels[0].
        options: the arguments of `UNet`.

    Source: Dhariwal and Nichol, "ADM", 2105.05233, section 3.

    Example:
        >>> net = AdmUNet(num_classes=10, in_channels=3, out_channels=6, channels=(8, 16), layers_per_block=1,
        ...               attention_levels=(1,), head_dim=8, cross_dim=None, num_groups=4)
        >>> net(torch.randn(2, 3, 8, 8), torch.tensor([0.0, 9.0]), class_labels=torch.tensor([3, 7])).shape
        torch.Size([2, 6, 8, 8])
    """

    def __init__(self, *, num_classes: int | None = None, time_dim: int | None = None, **options: Any):
        super().__init__(**options)
        if time_dim is not None and time_dim != self.time_dim:
            self.time_dim = time_dim
            self.time_embed[0] = nn.Linear(time_dim, self.embed_dim)
        self.num_classes = num_classes
        self.label_embed = None if num_classes is None else nn.Embedding(num_classes, self.embed_dim)
        self.config |= dict(num_classes=num_classes, time_dim=self.time_dim)

    def forward(
        self,
        sample: Tensor,  # [B, in_channels, H, W]
        timestep: Tensor,  # [B], 0..1000
        encoder_hidden_states: Tensor | ContextCache | None = None,  # [B, S, cross_dim]
        class_labels: Tensor | None = None,  # int64 [B], or as in UNet
        attention_mask: Tensor | None = None,  # bool [B, S], True = attend
    ) -> Tensor:  # [B, out_channels, H, W], dtype of sample
        """Predict from a noisy image, as `UNet.forward`.

        Raises:
            TypeError, ValueError: the class labels are missing, or not int64 [B] with values of a class.
        """
        if self.label_embed is not None:
            self._check_labels(class_labels, len(sample))
            class_labels = self.label_embed(class_labels)
        return super().forward(sample, timestep, encoder_hidden_states, class_labels, attention_mask)

    def _check_labels(self, labels: Tensor | None, batch: int) -> None:
        expected = f"labels: expected int64 [B] = ({batch},) in 0..{self.num_classes - 1}"
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            came = labels.dtype if isinstance(labels, Tensor) else labels
            raise TypeError(f"{expected}, got {came!r}")
        if labels.shape != (batch,):
            raise ValueError(f"{expected}, got {tuple(labels.shape)}")
        if labels.device.type == "cpu" and batch:  # a GPU reports a wrong label from its kernel
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"{expected}, got {low} to {high}")
