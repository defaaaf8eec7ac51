"""Every hostile file by name, how it is read, and what counts as a fault."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

from tests.hostile import images
from tests.hostile.checkpoints import EACH_NUMBER, LAYOUTS, Originals, names
from tests.hostile.damage import FLIPPED, HUGE
from tests.hostile.sandbox import Outcome, run
from tests.hostile.shards import SAMPLES, SHARDS

MEGABYTES = 250  # growth of memory that is accepted; good checkpoints take 90, bombs have 500
OUTSIDE = [Path("/tmp/dalle2_fast_escaped"), Path("/tmp/dalle2_fast_escaped.txt")]


def cases() -> list[str]:
    """The names of all cases: what is read / which file of it / what was done to that."""
    found = [f"{layout} / {file} / {damage}" for layout, file, damage in names()]
    found += [f"shard / {name}" for name in SHARDS]
    return found + [f"image / {name}" for name in (*images.IMAGES, *images.ODD_FILES)]


def load(name: str, originals: Originals) -> Outcome:
    """Make the file of a case, and read it in a child process."""
    with tempfile.TemporaryDirectory() as folder:
        sentinel = Path(folder) / "code was executed"
        return run(reader(name, originals, Path(folder)), sentinel)


def reader(name: str, originals: Originals, folder: Path):
    """A function that reads the file of a case, which is made in `folder`."""
    kind, *rest = name.split(" / ")
    if kind == "shard":
        shard = SHARDS[rest[0]][0](folder / "shard.tar")
        return lambda: read_shard(shard)
    if kind == "image":
        file = make_image(rest[0], folder)
        return lambda: images.read(file)
    path, file = originals.copy(kind, rest[0], folder)
    if rest[1] == EACH_NUMBER:
        return lambda: originals.load_with_each_number(kind, path, file, HUGE)
    LAYOUTS[kind].files[rest[0]][rest[1]](file)
    return lambda: originals.load(kind, path)


def make_image(name: str, folder: Path) -> Path:
    """The image of a case."""
    file = folder / "image.png"
    if name in images.ODD_FILES:
        images.ODD_FILES[name](file)
    else:
        file.write_bytes(images.IMAGES[name][0]())
    return file


def read_shard(path: Path) -> str:
    """How many different samples an endless stream gives in three passes."""
    from dalle2_fast.data import WebDatasetStream, WordTokenizer

    words = ["image", "number", "in", "red", *map(str, range(SAMPLES))]
    stream = WebDatasetStream(
        str(path), batch_size=4, resolutions=(8,), tokenizer=WordTokenizer(words, 8), shuffle=0
    )
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(3 * SAMPLES // 4):
            batch = stream.batch(step)
            seen |= {tuple(row.tolist()) for row in batch["tokens"]}
    return str(len(seen))


def judge(name: str, outcome: Outcome) -> str | None:
    """What is wrong with an outcome, or None."""
    if outcome.ran_code:
        return "code in the file was executed"
    if any(path.exists() for path in OUTSIDE):
        return "a file was written outside of the folder"
    if outcome.kind not in ("loaded", "refused"):
        return f"{outcome.kind} after {outcome.seconds:.0f} s: {outcome.message}"
    if outcome.megabytes > MEGABYTES:
        return f"{outcome.megabytes} MB of memory"
    if outcome.kind == "refused" and (len(outcome.message.splitlines()) != 1 or " at 0x" in outcome.message):
        return f"no message of one line for users: {outcome.message!r}"
    kind, *rest = name.split(" / ")
    expect = {"shard": _judge_shard, "image": _judge_image}.get(kind, _judge_checkpoint)
    return expect(kind, rest, outcome)


def _judge_shard(_: str, rest: list[str], outcome: Outcome) -> str | None:
    wanted = SHARDS[rest[0]][1]
    if wanted and (outcome.kind != "loaded" or int(outcome.message) < wanted):
        return f"{outcome.message} samples read, {wanted} are good"
    return "an unusable shard was read" if not wanted and outcome.kind == "loaded" else None


def _judge_image(_: str, rest: list[str], outcome: Outcome) -> str | None:
    wanted = rest[0] in images.IMAGES and images.IMAGES[rest[0]][1]
    if wanted != (outcome.kind == "loaded"):
        return f"{outcome.kind}: {outcome.message}"
    return None if wanted or "image.png" in outcome.message else f"no name of the file: {outcome.message}"


def _judge_checkpoint(layout: str, rest: list[str], outcome: Outcome) -> str | None:
    if outcome.kind == "refused":
        return None if outcome.message.startswith("/") else f"no name of the file: {outcome.message}"
    unnoticed = rest[1] == FLIPPED and not LAYOUTS[layout].has_digest
    if outcome.message != "as good" and not unnoticed:
        return outcome.message
    return "a flipped byte was not found" if rest[1] == FLIPPED and LAYOUTS[layout].has_digest else None
