"""The command line: `dalle2-fast generate|variations|interpolate|...`.

Nothing imports torch before a command needs it, so that `--help` answers at once. Every error ends in `main`
as one line on stderr: with exit code 2 if the user can correct it, with 1 if the program is at fault.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TextIO

from dalle2_fast import memory
from dalle2_fast.cli.parser import parse

# command -> (module with add_arguments(parser) and run(args) -> int, what it does). Only the module of the
# command that runs is imported.
COMMANDS = {
    "generate": ("dalle2_fast.cli.generate", "make images of a caption"),
    "variations": ("dalle2_fast.cli.editing.variations", "make other images of the same content"),
    "interpolate": ("dalle2_fast.cli.editing.interpolate", "make the images from one image to another"),
    "text-diff": ("dalle2_fast.cli.editing.text_diff", "change an image by the difference of two captions"),
    "inpaint": ("dalle2_fast.cli.editing.inpaint", "repaint a part of an image"),
    "invert": ("dalle2_fast.cli.editing.invert", "find the noise from which an image is sampled"),
    "reconstruct": (
        "dalle2_fast.cli.editing.reconstruct", "make an image from a few components of its embedding",
    ),
    "demo": ("dalle2_fast.cli.people.demo", "draw and edit images on a page in the browser"),
    "serve": ("dalle2_fast.cli.people.serve", "answer requests for images as OpenAI's images API does"),
    "vocabulary": ("dalle2_fast.cli.vocabulary", "list the words that a checkpoint knows"),
    "export": ("dalle2_fast.cli.export", "write the networks as files for ONNX or OpenVINO"),
    "info": ("dalle2_fast.cli.info", "show versions, backends and the checkpoint"),
    "data": ("dalle2_fast.cli.data", "check own data, or write them as WebDataset shards"),
    "train": ("dalle2_fast.cli.train", "train CLIP, prior, decoder and upsampler"),
    "embed": ("dalle2_fast.cli.bulk.embed", "compute CLIP's embeddings of image-caption pairs, for training"),
    "distill": ("dalle2_fast.cli.distill", "train a network that needs one to four steps from one of many"),
    "completion": ("dalle2_fast.cli.help.completion", "print a script that completes commands in a shell"),
    "evaluate": ("dalle2_fast.cli.evaluate", "score a checkpoint against captions and baselines"),
}
# TypeError is not among them: from a command line it is a fault of the program.
USER_ERRORS = (ValueError, OSError, FloatingPointError, ImportError, MemoryError)
# Errors of torch, safetensors and the trainer that the user can correct; importing them here would take 2 s.
USER_ERROR_NAMES = {"OutOfMemoryError", "TrainingError", "SafetensorError"}
MAX_LENGTH = 400  # characters of the line about an internal error, because torch writes whole pages


def main(argv: list[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: the words after `dalle2-fast`; None is this process's.

    Returns:
        The exit code: 0 done, 1 an internal error, 2 an error that the user can correct, 130 interrupted. An
        error is one line on stderr, or is raised if --traceback is in `argv`.

    Example:
        >>> main(["vocabulary", "--checkpoint", "no/such/folder"])
        2
    """
    if argv is None:  # the process is this command's, and so is its allocator
        memory.keep_freed_memory()
        argv = sys.argv[1:]
    try:
        with _every_letter_printable(sys.stdout):
            args, module = parse(argv, COMMANDS)
            code = import_module(module).run(args)
            return code or _flush()
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # `dalle2-fast vocabulary | head`: the reader has read enough
        _discard_output()
        return 0
    except Exception as error:
        if "--traceback" in argv:
            raise
        if isinstance(error, USER_ERRORS) or _is_environment(error):
            return _fail(_one_line(error), 2)
        message = f"internal error: {type(error).__name__}: {' '.join(str(error).split())}"
        if len(message) > MAX_LENGTH:
            message = f"{message[:MAX_LENGTH]} ..."
        return _fail(f"{message} (--traceback shows where; please report it)", 1)


@contextmanager
def _every_letter_printable(stream: TextIO | None) -> Iterator[None]:
    """Escape the letters that a stream cannot encode, so that no report fails after the work is done."""
    if not hasattr(stream, "reconfigure"):  # closed, or replaced by a caller
        yield
        return
    errors = stream.errors
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        if not stream.closed:
            stream.reconfigure(errors=errors)


def _flush() -> int:
    """Write out what was printed; the exit code."""
    if sys.stdout is not None:  # `>&-`
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:  # a full disk, after the work is done and its files are written
            _discard_output()
            return _fail(f"standard output: {error.strerror}", 2)
    return 0


def _discard_output() -> None:
    """Let Python's last flush of stdout go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_environment(error: Exception) -> bool:
    """Whether it is an error of torch, safetensors or the trainer that the user can correct."""
    return bool({kind.__name__ for kind in type(error).__mro__} & USER_ERROR_NAMES) or _is_memory(error)


def _is_memory(error: Exception) -> bool:
    # torch has no class of its own for a CPU that has too little memory.
    return (
        type(error).__name__ in ("OutOfMemoryError", "MemoryError")
        or isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _one_line(error: Exception) -> str:
    if _is_memory(error):
        detail = (str(error).splitlines() or ["Python"])[0]
        return f"out of memory; try a smaller --batch-size ({detail})"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str, code: int) -> int:
    print(f"dalle2-fast: {message}", file=sys.stderr)
    return code
