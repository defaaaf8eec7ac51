"""What is in the user's data, and what of it is broken: every sample is read and decoded once."""

from __future__ import annotations

import io
import itertools
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dalle2_fast.data.image_formats import open_image
from dalle2_fast.data.images import image_grid, to_pil, to_square
from dalle2_fast.data.pairs import IndexedPairs
from dalle2_fast.data.sources import StreamedNames, open_source
from dalle2_fast.data.sources.base import Complaint, Pair, PairSource
from dalle2_fast.data.sources.streamed import StreamedShards, phrase

if TYPE_CHECKING:
    from PIL.Image import Image

SIDES = (64, 128, 256, 512, 1024)  # of the shorter side, in pixels, up to which pictures are counted
SHEET, SHEET_SIDE, SHEET_LETTERS = 64, 128, 20  # pictures on a contact sheet, pixels, letters of a caption
AT_ONCE = 64


@dataclass
class Report:
    """The result of `check`.

    Args:
        kind: of the data.
        shards: files of shards, or None for what has none.
        usable: samples with an image that can be decoded and a caption.
        broken: what cannot be used.
        widths, heights: [smallest, median, largest], in pixels.
        shorter_sides: "256 to 511" -> pictures.
        formats: "JPEG" -> pictures.
        letters, words: of the captions, [smallest, median, largest].
        repeated_keys: keys that several samples have -> how many have it.
    """

    kind: str
    shards: int | None
    usable: int = 0
    broken: list[Complaint] = field(default_factory=list)
    widths: list[float] = field(default_factory=list)
    heights: list[float] = field(default_factory=list)
    shorter_sides: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    letters: list[float] = field(default_factory=list)
    words: list[float] = field(default_factory=list)
    repeated_keys: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """As plain values, for JSON."""
        return asdict(self) | {"broken": [complaint._asdict() for complaint in self.broken]}

    def lines(self, examples: int = 10) -> Iterator[str]:
        """The report as text.

        Args:
            examples: how many of what is broken are named, for each reason.
        """
        shards = "" if self.shards is None else f" in {self.shards:,} shards"
        yield f"{self.kind}: {self.usable:,} usable samples{shards}"
        if self.usable:
            yield f"pictures: {_range(self.widths)} pixels wide, {_range(self.heights)} high"
            yield f"shorter side: {_counts(self.shorter_sides)}; {_counts(self.formats)}"
            yield f"captions: {_range(self.letters)} letters, {_range(self.words)} words"
        if self.repeated_keys:
            names = ", ".join(itertools.islice(self.repeated_keys, 5))
            yield f"repeated keys: {len(self.repeated_keys):,}, such as {names}"
        yield f"broken: {len(self.broken):,}" if self.broken else "broken: nothing"
        reasons = Counter(complaint.reason for complaint in self.broken)
        for reason, count in reasons.most_common():
            yield f"  {reason}: {count:,}"
            found = (complaint for complaint in self.broken if complaint.reason == reason)
            for complaint in itertools.islice(found, examples):
                yield f"    {complaint.shard}, {complaint.where}"
            if count > examples:
                yield f"    and {count - examples:,} more (--json names all)"


def check(
    data: str | Path | Sequence[str | Path],
    *,
    allow_pipe: bool = False,
    contact_sheet: bool = False,
    threads: int = 4,
    progress: Callable[[Iterable], Iterable] = iter,
) -> tuple[Report, Image | None]:
    """Read all of the data once.

    Args:
        data, allow_pipe: as of PairStream.
        contact_sheet: also draw SHEET pictures, chosen at random with a fixed seed, with their captions.
        threads: that decode pictures.
        progress: wraps the iteration over samples.

    Returns:
        The report, and the contact sheet; None if it is not asked for, or no picture can be decoded.

    Raises:
        as of PairStream.
    """
    source = open_source(data, allow_pipe=allow_pipe)
    has_shards = "shards" in source.kind
    report = Report(source.kind, len(source.names) if has_shards else None)
    report.broken += getattr(source, "complaints", [])
    widths, heights, letters, words = [], [], [], []
    sides, formats, keys = Counter(), Counter(), Counter()
    sheet: list[tuple[int, Pair]] = []
    draw = random.Random(0)
    for pair, picture in _decoded(progress(every_pair(source, report.broken.append)), threads):
        keys[pair.key] += 1
        where = f"sample {pair.key}"
        if isinstance(picture, Exception):
            complaint = Complaint("image cannot be decoded", pair.shard, f"{where}: {phrase(picture)}")
            report.broken.append(complaint)
            continue
        if not pair.caption:
            reason = "caption is no text" if pair.caption is None else "no caption"
            report.broken.append(Complaint(reason, pair.shard, where))
            continue
        width, height, kind = picture
        widths.append(width)
        heights.append(height)
        sides[_side(min(width, height))] += 1
        formats[kind] += 1
        letters.append(len(pair.caption))
        words.append(len(pair.caption.split()))
        report.usable += 1
        # Each of N samples is on the sheet with the same probability (Vitter 1985, algorithm R).
        place = report.usable - 1 if report.usable <= SHEET else draw.randrange(report.usable)
        if contact_sheet and place < SHEET:
            sheet[place : place + 1] = [(report.usable, pair)]
    report.widths, report.heights = _spread(widths), _spread(heights)
    report.letters, report.words = _spread(letters), _spread(words)
    report.shorter_sides = {name: sides[name] for name in map(_side, (0, *SIDES)) if sides[name]}
    report.formats = dict(formats.most_common())
    report.repeated_keys = {key: count for key, count in keys.items() if count > 1}
    return report, _draw(sheet) if sheet else None


def every_pair(
    source: PairSource | StreamedNames, report: Callable[[Complaint], object]
) -> Iterator[Pair]:
    """All pairs once, in order, also those with an empty caption."""
    if not isinstance(source, StreamedNames):
        yield from IndexedPairs(source, 0, 0, None).in_order(report)
        return
    shards = StreamedShards(source.names, 0, 1, False, None, lambda caption: True, 0, 1)
    shards.report = report
    for name in source.names:
        yield from (pair for pair in shards.pairs(name) if pair is not None)


def decode(data: bytes) -> tuple[int, int, str] | Exception:
    """Width, height and format of an image that is decoded as in training; or why it cannot be."""
    try:
        with open_image(io.BytesIO(data)) as image:
            found = (*image.size, image.format or "?")
            to_square(image, SIDES[0])
            return found
    except Exception as error:  # PIL raises almost any exception on damaged files
        return error


def _decoded(
    pairs: Iterable[Pair], threads: int
) -> Iterator[tuple[Pair, tuple[int, int, str] | Exception]]:
    pairs = iter(pairs)
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="decode") as pool:
        while some := list(itertools.islice(pairs, AT_ONCE)):
            yield from zip(some, pool.map(decode, [pair.image for pair in some]), strict=True)


def _draw(sheet: list[tuple[int, Pair]]) -> Image:
    pictures, labels = [], []
    for _, pair in sorted(sheet, key=lambda each: each[0]):
        with open_image(io.BytesIO(pair.image)) as image:
            pictures += to_pil(to_square(image, SHEET_SIDE)[None].float() / 255)
        text = pair.caption.encode("latin-1", errors="replace").decode("latin-1")  # what the font has
        labels.append(text if len(text) <= SHEET_LETTERS else f"{text[: SHEET_LETTERS - 3]}...")
    return image_grid(pictures, labels=labels)


def _side(pixels: int) -> str:
    """The name of the range in which the shorter side is."""
    place = next((number for number, side in enumerate(SIDES) if pixels < side), len(SIDES))
    if place == 0:
        return f"below {SIDES[0]}"
    return f"{SIDES[-1]} or more" if place == len(SIDES) else f"{SIDES[place - 1]} to {SIDES[place] - 1}"


def _spread(values: list[int]) -> list[float]:
    return [min(values), statistics.median(values), max(values)] if values else []


def _range(spread: list[float]) -> str:
    low, middle, high = spread
    return f"{low:,g}" if low == high else f"{low:,g} to {high:,g} (median {middle:,g})"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items())
