"""The principal components of image embeddings for the tab "Reconstruction", found once for a page."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dalle2_fast.demo.fields import FieldError

if TYPE_CHECKING:
    from dalle2_fast.demo.worker import Job
    from dalle2_fast.models.prior.pca import PCA
    from dalle2_fast.pipeline.dalle2 import DALLE2

BATCH = 32  # images between two signs of progress


class Components:
    """Finds the components of a pipeline's embeddings from scenes of its world, and keeps them.

    Args:
        pipe: the pipeline; one whose checkpoint names no world has no components here.
    """

    def __init__(self, pipe: DALLE2) -> None:
        self._pipe, self._kept = pipe, {}

    def check(self, field: str) -> None:
        """FieldError for `field` if the checkpoint names no world whose images could be drawn."""
        if self._pipe.metadata.get("world") is None:
            raise FieldError(
                field,
                "this checkpoint names no world of scenes, from whose images the components are found; "
                "`dalle2-fast reconstruct --pca-folder` finds them from a folder of images",
            )

    def fit(self, job: Job, count: int) -> tuple[PCA, dict[str, float]]:
        """The components, and the seconds that it took to find them: none if they were kept.

        Args:
            job: shows the progress.
            count: images from which they are found.
        """
        from dalle2_fast.pipeline.reconstruction import world_images

        seconds = {}
        if count not in self._kept:
            begin = time.perf_counter()
            scenes = world_images(self._pipe, count, seed=0, batch_size=BATCH)
            followed = job.progress("components", scenes, -(-count // BATCH))
            self._kept = {count: self._pipe.fit_pca(followed)}
            seconds["components"] = time.perf_counter() - begin
        return self._kept[count], seconds
