"""The command line: how it starts, how it fails; `vocabulary`, `info` and the commands of other rooms."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from dalle2_fast import __version__, cli
from dalle2_fast.cli import info, vocabulary
from tests.support.tiny_pipeline import WORDS, tiny_pipeline

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_pipeline().save_pretrained(tmp_path_factory.mktemp("checkpoint"))


def run_python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, text=True, capture_output=True, **options)


def test_help_is_light():
    """`--help`, also of every command, answers without torch, numpy or Pillow."""
    code = (
        "import sys; from dalle2_fast.cli import COMMANDS, main\n"
        "for words in [[command, '--help'] for command in COMMANDS] + [['--help'], ['--version']]:\n"
        "    try: main(words)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'PIL', 'tqdm', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"dalle2-fast {__version__}\n")


def test_import_is_lazy_and_names_are_there():
    code = (
        "import sys, dalle2_fast\n"
        "assert 'torch' not in sys.modules\n"
        "for name in dalle2_fast.__all__: assert getattr(dalle2_fast, name) is not None, name\n"
        "assert set(dalle2_fast.__all__) <= set(dir(dalle2_fast))\n"
        "import dalle2_fast.models as models\n"
        "for name in models.__all__: assert getattr(models, name) is not None, name\n"
        "try: dalle2_fast.nothing\n"
        "except AttributeError as error: print(error)"
    )
    done = run_python("-c", code)
    assert done.stdout == "module 'dalle2_fast' has no attribute 'nothing'\n", done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "dalle2-fast: .*COMMAND"),
        (["paint"], "dalle2-fast: .*'paint'"),
        (["genrate", "a ring"], "dalle2-fast: unknown command 'genrate'; did you mean generate"),
        (["zzz"], "dalle2-fast: unknown command 'zzz'; expected one of generate, variations, "),
        (["--seed", "3", "generate"], "dalle2-fast: unknown option --seed; those of a command "),
        (["generate"], "dalle2-fast generate: .*caption"),
        (["generate", "a ring", "--no-such-option"], "dalle2-fast generate: unknown .* --no-such-option "),
        (["generate", "--stpes", "3"], "dalle2-fast generate: unknown option --stpes; did you mean --steps"),
        (["generate", "a ring", "--num=3"], "dalle2-fast generate: .*--num; did you mean --num-images"),
        (["inpaint", "x.png", "a", "red", "--box", "0,0,1,1"], "dalle2-fast inpaint: .*red; .* needs quotes"),
        (["generate", "a ring", "--sampler", "dppm"], "dalle2-fast generate: .*'dppm'; did you mean ddpm"),
        (["generate", "a ring", "--dtype", "bf61"], "dalle2-fast generate: .*--dtype: .*; did you mean bf16"),
        (["info", "more"], r"dalle2-fast info: unexpected: more \(options"),
        (["generate", "a \udcff ring"], r"dalle2-fast generate: .*caption: .* UTF-8, got 'a \\udcff"),
        (["generate", "a ring", "--quality", "0"], "dalle2-fast generate: .*--quality: .*1 to 100"),
        (["variations", "x.png", "--caption", "\udcff"], "dalle2-fast variations: .*--caption: .* UTF-8"),
        (["text-diff", "x.png", "--from", "\udcff"], "dalle2-fast text-diff: .*--from: .* UTF-8"),
        (["inpaint", "x.png", "\udcff", "--box", "0,0,1,1"], "dalle2-fast inpaint: .*caption: .* UTF-8"),
        (["generate", "a ring", "--steps", "0"], "dalle2-fast generate: .*--steps: .*at least 1, got '0'"),
    ],
)
def test_wrong_usage_is_one_line(arguments, line, capsys):
    """argparse prints a screen of usage with the error below it, blames a mistyped option on the caption and
    points to the options of no command; a caption that is not UTF-8 failed when the images were finished."""
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert re.match(line, err) and err.endswith("--help)\n") and err.count("\n") == 1


def command_that_raises(monkeypatch, error):
    def run(args):
        raise error

    monkeypatch.setattr(info, "run", run)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("size: expected\n  64, got 3"), 2, "size: expected 64, got 3"),
        (FileNotFoundError(2, "No such file or directory", "x.png"), 2, "x.png: No such file or directory"),
        (OSError("x.png: cannot be written"), 2, "x.png: cannot be written"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (ModuleNotFoundError("No module named 'webdataset'"), 2, "No module named 'webdataset'"),
        (FloatingPointError("not finite"), 2, "not finite"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 2, "out of memory.*--batch-size.*CUDA"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, error, code, line):
    command_that_raises(monkeypatch, error)
    assert cli.main(["info"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dalle2-fast: ") and err.count("\n") == 1
    assert re.search(line, err)


@pytest.mark.parametrize(
    "error", [TypeError("a\nbug"), KeyError("ema"), RuntimeError("x\n" * 5000), RecursionError("deep")]
)
def test_a_fault_of_the_program_is_one_line_and_says_how_to_see_more(monkeypatch, capsys, error):
    """Errors that Python or torch phrase fill a page with lines of the program."""
    command_that_raises(monkeypatch, error)
    assert cli.main(["info"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and len(err) < 600
    assert err.startswith(f"dalle2-fast: internal error: {type(error).__name__}: ") and "--traceback" in err


def test_traceback_on_request(monkeypatch):
    command_that_raises(monkeypatch, ValueError("why?"))
    for words in (["--traceback", "info"], ["info", "--traceback"]):
        with pytest.raises(ValueError, match="why"):
            cli.main(words)


def test_memory_of_a_cpu(monkeypatch, capsys):
    text = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: ..."
    for error in (RuntimeError(text), MemoryError()):
        command_that_raises(monkeypatch, error)
        assert cli.main(["info"]) == 2
        assert "out of memory; try a smaller --batch-size" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("redirection", "code", "says"),
    [
        ("", 0, ""),
        (">/dev/full", 2, "dalle2-fast: standard output: No space left on device\n"),
        (">&-", 0, ""),  # sys.stdout is None
    ],
)
def test_standard_output_that_cannot_take_the_report(redirection, code, says):
    """Python's own failure at the last flush, and a letter that the encoding lacks, come after the work."""
    program = (
        "import sys; from dalle2_fast import cli; from dalle2_fast.cli import info\n"
        "info.run = lambda args: print('caf\\u00e9 \\udcff')\n"
        "sys.exit(cli.main(['info']))"
    )
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {redirection}', sys.executable, program],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (code, says)
    assert done.stdout == ("" if redirection else "caf\\xe9 \\udcff\n")


def test_a_reader_that_goes_away(checkpoint):
    """`dalle2-fast vocabulary | head -0` is no error."""
    code = (
        "import sys; from dalle2_fast import cli; from dalle2_fast.cli import info\n"
        "def run(args): raise BrokenPipeError\n"
        "info.run = run\n"
        "sys.exit(cli.main(['info']))"
    )
    done = run_python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_command_is_its_module(monkeypatch, command):
    module = types.ModuleType(f"dalle2_fast.cli.{command}")
    module.add_arguments = lambda parser: parser.add_argument("--speed", type=int)
    module.run = lambda args: args.speed
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert cli.main([command, "--speed", "7"]) == 7


# ------------------------------------------------------------------------------------------ vocabulary, info


def test_vocabulary(checkpoint, capsys):
    assert cli.main(["vocabulary", "--checkpoint", str(checkpoint)]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == f"{len(WORDS)} words; a caption holds at most 6."
    assert " ".join(rest).split() == sorted(WORDS)


def test_vocabulary_of_scenes_is_grouped_and_has_examples(capsys):
    """A flat list does not say that only backgrounds are checkered."""
    assert cli.main(["vocabulary"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "119 words; a caption holds at most 34."
    for heading, word in (("shapes: ", "circle"), ("textures of backgrounds: ", "checkered")):
        assert any(line.startswith(heading) and word in line.split() for line in lines)
    assert "  three green stars\n" in out


def test_vocabulary_without_checkpoint(tmp_path, capsys):
    assert cli.main(["vocabulary", "--checkpoint", str(tmp_path / "none")]) == 2
    assert "no such checkpoint folder" in capsys.readouterr().err


def test_info(checkpoint, capsys):
    assert cli.main(["info", "--checkpoint", str(checkpoint)]) == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["dalle2 fast"].strip() == __version__ and lines["torch"].strip() == torch.__version__
    assert "format 1, float32" in lines["checkpoint"] and "decoder " in lines["checkpoint"]


def test_info_without_checkpoint(tmp_path, monkeypatch, capsys):
    """A broken installation is when the report is wanted; a folder that was asked for must exist."""
    from dalle2_fast import checkpoints

    monkeypatch.setattr(checkpoints, "embedded_path", lambda: tmp_path / "none")
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "none (" in out
    assert cli.main(["info", "--checkpoint", str(tmp_path / "none")]) == 2


def test_every_command_has_the_two_functions():
    for module in (info, vocabulary):
        assert callable(module.add_arguments) and callable(module.run)


