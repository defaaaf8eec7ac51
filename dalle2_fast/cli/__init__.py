"""The command line: `dalle2-fast generate|variations|interpolate|...`.

Nothing imports torch before a command needs it, so that `--help` answers at once. Every error that the user
can correct ends in `main` as one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from typing import NoReturn

from dalle2_fast import __version__

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
    "vocabulary": ("dalle2_fast.cli.vocabulary", "list the words that a checkpoint knows"),
    "info": ("dalle2_fast.cli.info", "show versions, backends and the checkpoint"),
    "train": ("dalle2_fast.cli.train", "train CLIP, prior, decoder and upsampler"),
    "evaluate": ("dalle2_fast.cli.evaluate", "score a checkpoint against captions and baselines"),
}
# TypeError is not among them: from a command line it is a fault of the program, and shows its traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError, ImportError)


def main(argv: list[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: the words after `dalle2-fast`; None is this process's.

    Returns:
        The exit code: 0 done, 2 an error that the user can correct (one line on stderr), 130 interrupted.

    Example:
        >>> main(["vocabulary", "--checkpoint", "no/such/folder"])
        2
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # `dalle2-fast vocabulary | head`: the reader has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if "--traceback" in argv or not (isinstance(error, USER_ERRORS) or _is_environment(error)):
            raise
        return _fail(_one_line(error), 2)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other error, because twenty lines of usage would hide it."""
        self.exit(2, f"{self.prog}: {message} (options: {self.prog} --help)\n")


def _run(argv: list[str]) -> int:
    parser = _Parser(
        prog="dalle2-fast",
        description="DALL-E 2 in PyTorch: from captions to images, and its training.",
    )
    parser.add_argument("--version", action="version", version=f"dalle2-fast {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error occurred")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    command = None
    for name, (home, purpose) in COMMANDS.items():
        underscored = name.replace("-", "_")  # the spelling of the methods
        subparser = subparsers.add_parser(
            name,
            aliases=[underscored] if underscored != name else [],
            help=purpose,
            description=f"{purpose[0].upper()}{purpose[1:]}.",
        )
        if chosen in (name, underscored):
            command = import_module(home)
            command.add_arguments(subparser)
    args = parser.parse_args(argv)  # exits with 0 for --help and 2 for a wrong option
    return command.run(args)


def _is_environment(error: Exception) -> bool:
    """Whether it is a RuntimeError of torch, safetensors or the trainer that the user can correct."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"OutOfMemoryError", "TrainingError", "SafetensorError"})


def _one_line(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of memory; try a smaller --batch-size ({str(error).splitlines()[0]})"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str, code: int) -> int:
    print(f"dalle2-fast: {message}", file=sys.stderr)
    return code
