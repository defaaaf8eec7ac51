"""Several captions, standard input, file formats, JSON; what is refused before torch is imported; help."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

from dalle2_fast import cli
from dalle2_fast.cli.checks import machine
from dalle2_fast.cli.checks.request import EMBEDDED, check_caption, read_config
from dalle2_fast.cli.parser import make_parser, parse
from tests.support.tiny_pipeline import tiny_pipeline

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_pipeline().save_pretrained(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def command(checkpoint, tmp_path, monkeypatch, capsys):
    """command(*words) -> exit code, stdout, stderr; on the tiny checkpoint, in an empty folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(name, *words):
        code = cli.main([name, *words, "--checkpoint", str(checkpoint)])
        return code, *capsys.readouterr()

    return run


def standard_input(monkeypatch, data: bytes):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


# ------------------------------------------------------------------------------------------- what is drawn


def test_several_captions_are_the_rows_of_one_grid(command):
    """Catches: captions that are lost, or that lie in the columns."""
    options = ["-n", "2", "-s", "3", "-q", "--device", "cpu", "--json"]
    code, out, err = command("generate", "a red ring", *options, "a blue square", "--individual", "each")
    facts = json.loads(out)
    assert (code, err, facts["images"], facts["captions"]) == (0, "", 4, 2)
    assert Path(facts["image"]) == Path("outputs/a-red-ring-and-1-more-3.png").resolve()
    with Image.open(facts["image"]) as grid:
        assert json.loads(grid.text["captions"]) == ["a red ring", "a blue square"]
        assert grid.height > grid.width // 2 and grid.height >= 2 * 32
    captions = []
    for name in sorted(os.listdir("each")):
        with Image.open(f"each/{name}") as image:
            captions.append(image.text["caption"])
    assert captions == ["a red ring"] * 2 + ["a blue square"] * 2


def test_standard_input_is_captions_line_by_line(command, monkeypatch):
    """Catches: empty lines and a mark of Windows that become captions."""
    standard_input(monkeypatch, b"\xef\xbb\xbfa red ring\r\n\n a blue ring \n")
    code, out, _ = command("generate", "-", "-n", "1", "-q", "--json", "-o", "x.png", "--device", "cpu")
    assert code == 0 and json.loads(out)["captions"] == 2
    with Image.open("x.png") as grid:
        assert json.loads(grid.text["captions"]) == ["a red ring", "a blue ring"]


@pytest.mark.parametrize(
    ("words", "data", "says"),
    [
        (["a", "red", "ring"], b"", "a caption of several words needs quotes around it, got a red ring as 3"),
        (["-"], b"\n\n", "standard input: expected at least one caption, got none"),
        (["-"], b"\xff\xfe", "standard input: expected text in UTF-8"),
        (["-", "-"], b"a ring", "standard input (-) can be read once"),
        (["a ring"] * 33, b"", "a grid has up to 32 captions, got 33; --prompts FILE"),
        (["a ring", "a red zebra"], b"", 'caption 2: unknown word "zebra"'),
        (["a ring", " "], b"", "caption 2: expected words, got an empty caption"),
        (["a ring", "a red ring", "--init-image", "x.png"], b"", "--init-image: expected a single caption"),
    ],
)
def test_captions_that_are_refused(command, monkeypatch, words, data, says):
    """Catches: one word per picture where quotes were forgotten, a grid of thousands of rows, a traceback."""
    standard_input(monkeypatch, data)
    code, out, err = command("generate", *words)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1 and not os.listdir()


@pytest.mark.parametrize(("name", "kind"), [("x.jpg", "JPEG"), ("x.JPEG", "JPEG"), ("x.webp", "WEBP")])
def test_the_suffix_chooses_the_format(command, name, kind):
    """Catches: a PNG under another name, a quality without effect, metadata that only PNG files have."""
    sizes = []
    for quality in ("10", "95"):
        words = ["-n", "1", "-s", "1", "-q", "-o", name, "--quality", quality, "--individual", "each"]
        assert command("generate", "a red ring", *words, "--device", "cpu")[0] == 0
        sizes.append(os.path.getsize(name))
    assert sizes[0] < sizes[1]
    for path in (name, f"each/000{Path(name).suffix}"):
        with Image.open(path) as image:
            texts = json.loads(image.getexif()[0x010E])
            assert image.format == kind and texts["caption"] == "a red ring" and texts["seed"] == "1"


def test_a_file_of_the_default_name_is_never_replaced(command):
    """Catches: a second run with the same seed that overwrites the first."""
    for _ in range(2):
        assert command("generate", "a red ring", "-n", "1", "-s", "7", "-q", "--device", "cpu")[0] == 0
    assert sorted(os.listdir("outputs")) == ["a-red-ring-7-2.png", "a-red-ring-7.png"]


def test_every_report_can_be_json(command):
    """Catches: --json that prints a line for people, too."""
    words = json.loads(command("vocabulary", "--json")[1])
    assert words["words"] == ["a", "above", "blue", "red", "ring", "square"] and words["limit"] == 6
    facts = json.loads(command("info", "--json")[1])
    assert facts["torch"] == torch.__version__ and "decoder" in facts["checkpoint"]
    assert cli.main(["vocabulary", "--json"]) == 0


def test_reports_of_export_and_evaluate_can_be_json(command, monkeypatch):
    """Catches: lines for people among the JSON, or a report that is not printed at all."""
    from dalle2_fast.evaluation import measure
    from dalle2_fast.pipeline.exporting import export, runtimes

    monkeypatch.setattr(runtimes, "find_runtime", lambda name: None)
    monkeypatch.setattr(export, "export_networks", lambda *arguments: iter([("decoder", 1e-6)]))
    code, out, _ = command("export", "new", "--format", "onnx", "--json")
    assert code == 0
    assert json.loads(out) == {"folder": str(Path("new").resolve()), "largest_difference": {"decoder": 1e-6}}
    monkeypatch.setattr(measure, "evaluate", lambda *arguments, **options: {"iid": {"one": 1.0}})
    code, out, _ = command("evaluate", "--json", "--quiet", "--device", "cpu", "--output", "x.json")
    written = json.loads(Path("x.json").read_text())
    assert code == 0 and json.loads(out) == written and written["iid"] == {"one": 1.0}


# ---------------------------------------------------------------------------- refused before torch is there


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate", "a blurple circle"], 'unknown word "blurple" (nearest: purple, blue)'),
        (["generate", "a checkered circle"], '"checkered" before "circle"'),
        (["generate", "a red circle", "--size", "100"], "--size: expected one of 64, 256, got 100"),
        (["generate", "a red circle", "-o", "x.gif"], "--output: expected a name that ends in"),
        (["variations", "no.png"], "image: no such file: no.png"),
        (["text-diff", "x.png", "--from", "a zebra", "--to", "a star"], '--from: unknown word "zebra"'),
        (["inpaint", "x.png", "a zebra", "--box", "0,0,1,1"], 'unknown word "zebra"'),
    ],
)
def test_an_error_comes_before_torch(words, says, tmp_path):
    """Catches: seconds of imports and of reading weights in front of a spelling mistake."""
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    code = (
        "import sys; from dalle2_fast.cli import main\n"
        f"code = main({words!r})\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'heavy'\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert says in done.stderr and done.stderr.count("\n") == 1


def test_the_checks_without_torch_are_those_of_the_tokenizer(checkpoint):
    """Catches: two vocabularies or two messages that drift apart."""
    from dalle2_fast import checkpoints, data

    assert EMBEDDED == checkpoints.embedded_path()
    for folder in (None, checkpoint):
        config = read_config(folder)
        tokenizer = data.tokenizer_from_config(config["tokenizer"])
        for caption in ("a red ring", "a blurple ring", "...", "ring " * 50, "a checkered ring", "Red RING!"):
            ours, theirs = [], []
            for check, errors in ((lambda: check_caption(config, caption), ours),  # noqa: B023
                                  (lambda: tokenizer.encode(caption), theirs)):  # noqa: B023
                try:
                    check()
                except ValueError as error:
                    errors.append(str(error))
            assert ours == theirs, caption


def test_a_damaged_config_is_left_to_loading(tmp_path):
    """Catches: an early check that crashes where loading has a clear message."""
    for text in ("{", "[]", '{"model": "CLIP"}', '{"model": "DALLE2", "tokenizer": 3, "decoder": []}'):
        (tmp_path / "config.json").write_text(text)
        code = cli.main(["generate", "a ring", "--checkpoint", str(tmp_path), "--size", "64", "-q"])
        assert code == 2
    assert read_config(tmp_path / "nowhere") is None


# ------------------------------------------------------------------------------------------ help, completion


def test_help_has_groups_defaults_of_the_checkpoint_and_examples(checkpoint, capsys):
    """Catches: defaults of another checkpoint, or an option outside of its group."""
    texts, tiny = [], str(checkpoint)
    for words in ([], ["--checkpoint", tiny], [f"--checkpoint={tiny}"], ["--checkpoint", "no"]):
        with pytest.raises(SystemExit) as end:
            cli.main(["generate", *words, "--help"])
        assert end.value.code == 0
        texts.append(" ".join(capsys.readouterr().out.split()))
    assert "diffusion steps of the decoder (default 12)" in texts[0] and "makes (default 256)" in texts[0]
    assert texts[1] == texts[2] and "diffusion steps of the decoder (default 2)" in texts[1]
    assert "diffusion steps of the decoder --guidance" in texts[3]  # no config, no defaults
    for heading in ("images:", "decoder:", "prior:", "upsampler:", "run:", "output:", "examples:"):
        assert f" {heading} " in texts[0]


def test_examples_are_command_lines_that_parse():
    """Catches: an example in --help with an option that was renamed."""
    count = 0
    for command, (home, _) in cli.COMMANDS.items():
        examples = getattr(import_module(home), "EXAMPLES", "").replace("\\\n", " ")
        for line in examples.splitlines():
            _, ours, rest = re.sub(r"[>#].*|\| jq.*", "", line).partition("dalle2-fast ")
            words = ["dalle2-fast", *shlex.split(rest)]
            if ours and words[1:2] == [command]:
                parse(words[1:], cli.COMMANDS)
                count += 1
    assert count >= 15


def test_completion_knows_every_command_and_option(capsys):
    """Catches: a script without the options, which are declared only for the command that runs."""
    pytest.importorskip("shtab")
    for shell in ("bash", "zsh"):
        assert cli.main(["completion", shell]) == 0
        script = capsys.readouterr().out
        for word in (*cli.COMMANDS, "--negative", "--box", "--find-lr"):
            assert word in script, word


def test_completion_without_shtab_says_what_is_missing(monkeypatch, capsys):
    """Catches: an internal error where an optional package is not installed."""
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "pip install shtab" in capsys.readouterr().err


def test_every_setting_of_sampling_is_an_option_of_generate():
    """Catches: a new setting that the command line lacks."""
    from dalle2_fast.pipeline.settings import SamplingSettings

    parser = make_parser(cli.COMMANDS, ["generate"]).commands["generate"]
    assert {*SamplingSettings.names()} <= {action.dest for action in parser._actions}


# -------------------------------------------------------------------------------------------- info --check


def test_info_check_draws_a_picture(command):
    """Catches: a check that times nothing, and a report that says nothing."""
    code, out, _ = command("info", "--check", "--device", "cpu", "--dtype", "fp32")
    lines = dict(line.split(":", 1) for line in out.splitlines())
    assert code == 0 and "decoder" in lines["picture"] and lines["slow"].strip()
    facts = json.loads(command("info", "--check", "--json", "--device", "cpu")[1])
    assert facts["seconds"]["in all"] > 0 and isinstance(facts["slow_because"], list)
    assert command("info", "--dtype", "bf16")[0] == 2


FAST = dict(
    cuda=None, devices=[], native_extension=True, why_no_native=None, cpu_instructions="AVX-512 with BF16",
    cpu_threads=10_000, native={}, why_not_fused=None,
)  # fmt: skip


@pytest.mark.parametrize(
    ("device", "dtype", "change", "says"),
    [
        ("cpu", "float32", dict(cuda="13.0"), "torch was built with CUDA 13.0 and finds no GPU"),
        ("cpu", "float32", dict(devices=["H200"]), "this machine has H200: --device cuda"),
        ("cpu", "float32", dict(native_extension=False, why_no_native="no compiler"), "(no compiler)"),
        ("cpu", "float32", dict(cpu_instructions="portable"), "portable instructions"),
        ("cpu", "float32", dict(cpu_instructions="AVX2"), "AVX2 instructions"),
        ("cpu", "bfloat16", {}, "no matrix units for bfloat16: --dtype fp32"),
        ("cpu", "float32", dict(cpu_threads=7), "torch runs 7 thread(s) on 8 cores"),
        ("cuda", "float32", {}, "float32 on a GPU: --dtype bf16"),
        ("cuda", "bfloat16", dict(why_not_fused="triton is not installed"), "(triton is not installed)"),
        ("cuda", "bfloat16", dict(native={"why_no_cuda": "no nvcc"}), "no CUDA part (no nvcc)"),
    ],
)
def test_each_reason_is_said_and_no_other(monkeypatch, device, dtype, change, says):
    """Catches: a slow machine that passes as a fast one, and a reason that is always given."""
    monkeypatch.setattr(machine, "_large_pages", lambda: "madvise")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: range(8), raising=False)
    arguments = torch.device(device), getattr(torch, dtype)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (8.0, 0, 0), raising=False)
    (reason,) = machine.slow_because(*arguments, FAST | change, fast_bfloat16=False)
    assert says in reason


def test_a_fast_machine_has_no_reason(monkeypatch, tmp_path):
    """Catches: advice where there is nothing to do; a setting of large pages that is misread."""
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.setattr(machine, "LARGE_PAGES", tmp_path / "enabled")
    info, load = FAST | {"cpu_threads": 8}, 16.0
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (load, 0, 0), raising=False)
    for text, count in (("always [madvise] never", 0), ("always madvise [never]", 1), (None, 0)):
        machine.LARGE_PAGES.unlink(missing_ok=True)
        if text:
            machine.LARGE_PAGES.write_text(text)
        reasons = machine.slow_because(torch.device("cpu"), torch.float32, info, fast_bfloat16=True)
        assert len(reasons) == count
    load = 16.5
    (reason,) = machine.slow_because(torch.device("cpu"), torch.float32, info, fast_bfloat16=True)
    assert "16.5 of them want its 8 core(s)" in reason


def test_prompts_can_be_json_and_take_the_decoders_options(command, tmp_path):
    """Catches: a bulk run that drops --spacing, or whose record does not say that it had it."""
    (tmp_path / "captions.txt").write_text("a red ring\na blue ring\n")
    words = ["--prompts", str(tmp_path / "captions.txt"), "-o", "made", "-s", "1", "-q", "--json"]
    words += ["--device", "cpu"]
    code, out, _ = command("generate", *words, "--spacing", "log_snr")
    facts = json.loads(out)
    assert code == 0 and (facts["made"], facts["were_there"], facts["seed"]) == (2, 0, 1)
    assert json.loads(Path("made/generate.json").read_text())["settings"]["spacing"] == "log_snr"
    code, _, err = command("generate", *words, "--quality", "50")
    assert code == 2 and "--quality: is for a single caption" in err


def test_a_format_that_holds_fewer_pixels_is_refused(tmp_path):
    """Catches: an error of the encoder without the name of the option, or a file that is cut."""
    from dalle2_fast.cli.image_files import save_image

    wide = Image.new("RGB", (16_384, 1))
    with pytest.raises(ValueError, match="^--output: .webp holds up to 16383 pixels a side, got 16384 x 1"):
        save_image(wide, tmp_path / "x.webp", {})
    save_image(wide, tmp_path / "x.jpg", {"caption": "ring é \udcff"}, 80)
    with Image.open(tmp_path / "x.jpg") as image:
        assert json.loads(image.getexif()[0x010E]) == {"caption": "ring é \\udcff"}
