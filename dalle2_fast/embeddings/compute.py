"""A shard of pairs -> the embeddings of its images and captions, and their files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dalle2_fast.checkpoints.atomic import atomic_write
from dalle2_fast.data.image_formats import open_image
from dalle2_fast.data.images import to_square
from dalle2_fast.data.sources.base import Complaint, Pair, PairSource, SampleError
from dalle2_fast.data.sources.streamed import phrase
from dalle2_fast.embeddings.folder import as_utf8, import_parquet, part_path

if TYPE_CHECKING:
    from dalle2_fast.data.text.tokenizer import Tokenizer
    from dalle2_fast.models.clip.model import CLIP


class Sample(NamedTuple):
    """A sample that can be embedded."""

    row: int
    pair: Pair
    image: Tensor  # uint8 [3, S, S]


@dataclass
class Embedded:
    """The embeddings of a shard.

    Args:
        images: float32 [N, E], of unit norm.
        texts: float32 [N, E], of unit norm.
        keys, captions, rows: of the samples.
        skipped: samples without an embedding.
    """

    images: list[np.ndarray] = field(default_factory=list)
    texts: list[np.ndarray] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    skipped: list[Complaint] = field(default_factory=list)


class Embedder:
    """Embeds the samples of shards.

    Args:
        clip: in evaluation mode, with both towers.
        tokenizer: of the captions; words that it does not know become <unk>, long captions are cut.
        batch_size: samples that the device embeds at a time.
        threads: that decode the images of the next batch meanwhile.
        autocast: dtype of the computation; None is that of the weights.
    """

    def __init__(
        self, clip: CLIP, tokenizer: Tokenizer, *, batch_size: int, threads: int = 4,
        autocast: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.clip, self.tokenizer = clip, tokenizer
        self.batch_size, self.autocast = batch_size, autocast
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def shard(self, source: PairSource, shard: int, progress: Callable[[int], object]) -> Embedded:
        """The embeddings of a shard.

        Args:
            source: of the pairs.
            shard: its number.
            progress: called with the number of samples that are done.

        Raises:
            FloatingPointError: an embedding is not finite.
        """
        found = Embedded()
        for batch in self._batches(source, shard):
            samples = [each for each in batch if isinstance(each, Sample)]
            found.skipped += [each for each in batch if isinstance(each, Complaint)]
            if samples:
                images, texts = self._embed(samples)
                found.images.append(images)
                found.texts.append(texts)
                found.keys += [sample.pair.key for sample in samples]
                found.captions += [sample.pair.caption or "" for sample in samples]
                found.rows += [sample.row for sample in samples]
            progress(len(batch))
        return found

    def _batches(self, source: PairSource, shard: int) -> Iterator[list[Sample | Complaint]]:
        """All samples in order; the next batch is decoded while one is used."""

        def start(begin: int) -> list:
            rows = range(begin, min(begin + self.batch_size, source.counts[shard]))
            return [self._pool.submit(self._read, source, shard, row) for row in rows]

        waiting = start(0)
        for begin in range(self.batch_size, source.counts[shard] + self.batch_size, self.batch_size):
            current, waiting = waiting, start(begin)
            yield [future.result() for future in current]

    def _read(self, source: PairSource, shard: int, row: int) -> Sample | Complaint:
        name = source.names[shard]
        try:
            pair = source.read(shard, row)
        except SampleError as error:
            return error.complaint
        except OSError as error:
            return Complaint("sample cannot be read", name, f"sample {row}: {phrase(error)}")
        if pair.caption is None or not self.tokenizer.has_text(pair.caption):
            reason = "caption is no text" if pair.caption is None else "no caption"
            return Complaint(reason, name, f"sample {pair.key}")
        try:
            with open_image(io.BytesIO(pair.image)) as image:
                return Sample(row, pair._replace(image=None), to_square(image, self.clip.image_size))
        except Exception as error:  # PIL raises almost any exception on damaged files
            return Complaint("image cannot be decoded", name, f"sample {pair.key}: {phrase(error)}")

    @torch.no_grad()
    def _embed(self, samples: list[Sample]) -> tuple[np.ndarray, np.ndarray]:
        device = self.clip.logit_scale.device
        images = torch.stack([sample.image for sample in samples]).to(device).float() / 255
        captions = [sample.pair.caption for sample in samples]
        tokens = self.tokenizer.encode(captions, unknown="token", truncate=True).to(device)
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            found = self.clip.encode_image(images), self.clip.encode_text(tokens)[0]
        image, text = (embed.float().cpu().numpy() for embed in found)
        for name, embed in (("image", image), ("text", text)):
            if not np.isfinite(embed).all():
                raise FloatingPointError(f"{name}: an embedding is not finite; are the weights damaged?")
        return image, text


def write_part(folder: Path, part: int, parts: int, found: Embedded, width: int, dtype: str) -> None:
    """Write the files of a part, each whole or not at all; the metadata, which complete it, come last.

    Args:
        folder: of the embeddings.
        part, parts: its number, and the number of all.
        found: the embeddings.
        width: of an embedding.
        dtype: one of DTYPES.

    Raises:
        OSError: a file cannot be written.
    """
    import_parquet()
    import pyarrow

    for kind, rows in (("img_emb", found.images), ("text_emb", found.texts)):
        array = np.concatenate([np.empty((0, width), np.float32), *rows]).astype(dtype)
        with _writing(part_path(folder, kind, part, parts)) as temporary, open(temporary, "wb") as file:
            np.save(file, array, allow_pickle=False)
    columns = {
        "image_path": pyarrow.array(map(as_utf8, found.keys), pyarrow.string()),
        "caption": pyarrow.array(found.captions, pyarrow.string()),
        "row": pyarrow.array(found.rows, pyarrow.int32()),
    }
    with _writing(part_path(folder, "metadata", part, parts)) as temporary:
        import_parquet().write_table(pyarrow.table(columns), temporary)


def _writing(path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return atomic_write(path)
