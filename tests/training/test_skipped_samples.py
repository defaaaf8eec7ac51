"""Training on shards with bad samples says so in plain lines, and nothing with --quiet."""

import io
import tarfile

import pytest
from PIL import Image

from dalle2_fast.cli import main


def shard_with_a_bad_sample(path):
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "navy").save(picture, format="PNG")
    with tarfile.open(path, "w") as tar:
        for index in range(9):
            image = b"not an image" if index == 2 else picture.getvalue()
            for ending, data in (("png", image), ("txt", f"number {index}".encode())):
                entry = tarfile.TarInfo(f"{index}.{ending}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


@pytest.mark.parametrize("quiet", [False, True])
def test_lines_on_skipped_samples(tmp_path, capfd, quiet):
    """Raw Python warnings have a place in our code and addresses of objects, and came with --quiet too."""
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    shard = shard_with_a_bad_sample(tmp_path / "a.tar")
    options = ["--preset", "tiny", "--steps", "1", "--device", "cpu", "--out", str(tmp_path / "run")]
    options += ["--data", str(shard), "--batch-size", "16"]  # each sample is met
    assert main(["train", "clip", *options, *(["--quiet"] if quiet else [])]) == 0
    said = capfd.readouterr().err
    if quiet:
        assert said == ""
    else:
        reason = "it is no image that Pillow can read"
        assert f"dalle2-fast: data: image cannot be decoded: {shard}, sample 2: {reason}" in said
        assert "clip: skipped" in said and "samples or parts of shards" in said
        assert " at 0x" not in said and "SkippedSample" not in said and ".py:" not in said
