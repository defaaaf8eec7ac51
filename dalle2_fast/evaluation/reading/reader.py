"""Images -> Reading: background, regions, objects, in this order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle2_fast.data.synthetic.palette import rgb_to_lab
from dalle2_fast.data.synthetic.world import World
from dalle2_fast.evaluation.reading.background import BackgroundReader
from dalle2_fast.evaluation.reading.components import MIN_AREA, dilate, erode, find_components
from dalle2_fast.evaluation.reading.objects import ObjectReader, has_nested_objects
from dalle2_fast.evaluation.reading.table import Reading, make_reading
from dalle2_fast.evaluation.reading.tones import segment_distance

SIDE = 64  # all images are resized to it: more pixels would change nothing, and fewer are too few
CHUNK = 32  # images at a time: about 100 MB of temporaries
# Lab distance. Objects are at least 30 from their background (palette.FIRST_TONE_DISTANCE); half of that is
# the border. Second tones may come as near as 24.
FOREGROUND = 14.0


class Reader:
    """Reads images of scenes.

    Args:
        world: of the scenes; only what it has is ever found. None: the full world.

    Example:
        >>> images = torch.full((1, 3, 64, 64), 0.95)
        >>> Reader().read(images).count
        tensor([0])
    """

    def __init__(self, world: World | None = None) -> None:
        world = world or World()
        self.background_reader, self.object_reader = BackgroundReader(world), ObjectReader(world)
        # A border half-way between object and background keeps blurred neighbours apart. It is possible only
        # where no object contains tones that are close to the background's.
        crisp = tuple(world.fills) == ("solid",) and not has_nested_objects(world)
        self.border = 0.45 if crisp else 0.2  # of the largest contrast nearby

    @torch.no_grad()
    def read(self, images: Tensor) -> Reading:
        """Read the images, on the CPU.

        Args:
            images: float [n, 3, H, W] in [0, 1], on any device; n may be 0.

        Raises:
            ValueError: `images` has another dtype or shape.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images: expected float [n, 3, H, W], got {images.dtype} {tuple(images.shape)}")
        images = images.float().cpu().clamp(0, 1)
        if images.shape[-2:] != (SIDE, SIDE):
            smaller = min(images.shape[-2:]) > SIDE
            images = F.interpolate(images, (SIDE, SIDE), mode="area" if smaller else "bilinear")
        parts = [self._read(part) for part in images.split(CHUNK)] if len(images) else [self._read(images)]
        return Reading(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _read(self, images: Tensor) -> Reading:
        height, width = images.shape[-2:]
        background = self.background_reader.read(images)
        lab = rgb_to_lab(images.permute(0, 2, 3, 1))  # [n, H, W, 3]
        ends = rgb_to_lab(torch.stack([background.light, background.dark]))[:, :, None, None]
        contrast = segment_distance(lab, *ends)  # [n, H, W]
        nearby = F.max_pool2d(contrast[:, None], 5, 1, 2)[:, 0]
        foreground = contrast > (nearby * self.border).clamp_min(FOREGROUND)
        image, region = find_components(foreground, MIN_AREA * height * width)
        thick = erode(region).flatten(1).any(1)  # the rest are lines
        objects = self.object_reader.read(images, lab, background, image[thick], region[thick])
        texture = self.background_reader.read_texture(images, background, dilate(foreground, 3))
        return make_reading(background.index, texture, objects)
