"""Damaged and hostile files: an error of one line, or the right content; no code, bounded memory and time."""

from __future__ import annotations

import sys
import warnings

import pytest

from dalle2_fast import cli
from tests.hostile.cases import cases, judge, load, make_image
from tests.hostile.checkpoints import LAYOUTS, Originals
from tests.hostile.shards import SHARDS

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc"),
    # torch.jit, which writes archives like OpenAI's, is deprecated, as is diffusers' pipeline.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return Originals(tmp_path_factory.mktemp("originals"))


@pytest.mark.parametrize("name", cases())
def test_a_hostile_file(name, originals):
    """Code that is executed, a crash, memory or time without bound, wrong weights, errors for programmers."""
    if name.startswith("shard"):
        pytest.importorskip("webdataset", reason="webdataset is not installed")
    outcome = load(name, originals)
    assert judge(name, outcome) is None, outcome


@pytest.mark.parametrize(
    "layout, file, damage",
    [
        ("dalle2_fast", "config.json", "all numbers 10^9"),
        ("dalle2_fast", "config.json", "nested deeply"),
        ("dalle2_fast", "model.safetensors", "git lfs pointer"),
        ("dalle2_fast", "model.safetensors", "offsets beyond the end"),
        ("diffusers", "model_index.json", "a link to itself"),
        ("karlo", "decoder-ckpt*", "code in the pickle"),
        ("karlo", "ViT-L-14.pt", "a zip bomb"),
    ],
)
def test_a_checkpoint_on_the_command_line(layout, file, damage, originals, tmp_path, capsys):
    """Exit code 1 and "internal error", or a traceback: the user did nothing that we could mend."""
    if needs := LAYOUTS[layout].needs:
        pytest.importorskip(needs)
    path, target = originals.copy(layout, file, tmp_path)
    LAYOUTS[layout].files[file][damage](target)
    capsys.readouterr()  # what the packages print that write the good checkpoint
    output = tmp_path / "out.png"
    code = cli.main(["generate", "a red ring", "--checkpoint", str(path), "--output", str(output), "--quiet"])
    assert_refused(code, capsys, str(path))
    assert not output.exists()


@pytest.mark.parametrize(
    "name", ["a png of 3.6 billion pixels", "half a jpeg", "postscript", "a link to itself"]
)
def test_an_image_on_the_command_line(name, tmp_path, capsys):
    """Pillow raises almost any exception for damaged files, which are those of other people."""
    file = make_image(name, tmp_path)
    options = ["--output", str(tmp_path / "out.png"), "--quiet", "--device", "cpu"]
    code = cli.main(["variations", str(file), *options])
    assert_refused(code, capsys, str(file))


@pytest.mark.parametrize("name", ["empty", "no tar at all", "a gzip bomb"])
def test_a_shard_on_the_command_line(name, tmp_path, capsys):
    """Training without one readable sample must end, and say why."""
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    shard = SHARDS[name][0](tmp_path / "shard.tar")
    options = ["--preset", "tiny", "--steps", "1", "--out", str(tmp_path / "run"), "--data", str(shard)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = cli.main(["train", "clip", *options, "--device", "cpu", "--quiet"])
    assert_refused(code, capsys, "data: ")


def assert_refused(code: int, capsys, words: str) -> None:
    said = capsys.readouterr().err
    assert code == 2 and len(said.splitlines()) == 1, said
    assert words in said and "Traceback" not in said and "internal error" not in said
