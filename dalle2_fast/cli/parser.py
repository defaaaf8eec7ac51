"""The parser of the command line: an error is one line, with the word at fault and the nearest right one."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from typing import NoReturn

from dalle2_fast import __version__


class Parser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations: `--num` would otherwise be taken for `--num-images`."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options, allow_abbrev=False)
        self.commands: dict[str, Parser] = {}  # filled by make_parser

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """As argparse, with the nearest of the choices."""
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            hint = did_you_mean(str(value), choices)
            raise argparse.ArgumentError(action, f"expected one of {', '.join(choices)}, got {value!r}{hint}")

    def error(self, message: str) -> NoReturn:
        """One line, as for every other error, because twenty lines of usage would hide it."""
        self.exit(2, f"{self.prog}: {message} (options: {self.prog} --help)\n")

    def reject_unknown_options(self, words: Sequence[str], hint: str = "") -> None:
        """End with an error, and the hint, if there is an option that the parser does not have.

        argparse looks for missing arguments first, so that a mistyped option would be blamed on the caption.
        """
        known = self._option_string_actions
        for word in words:
            if word == "--":  # what follows are no options
                return
            name = word.partition("=")[0]
            # As argparse does, a negative number or a word with a blank is taken for a value.
            if len(word) > 1 and word[0] == "-" and name not in known and not re.match(r"-\.?\d", word):
                if " " not in name:
                    self.error(f"unknown option {name}{did_you_mean(name, known) or hint}")


def parse(
    words: Sequence[str], commands: Mapping[str, tuple[str, str]]
) -> tuple[argparse.Namespace, str]:
    """Read a command line.

    Args:
        words: what follows `dalle2-fast`.
        commands: name -> (its module, its purpose); only the module of the command that is asked for is
            imported, for the options that its add_arguments(parser) declares.

    Returns:
        The arguments and the module. SystemExit for --help (0) and for a wrong command line (2).
    """
    top = make_parser({}, [])
    place = next((place for place, word in enumerate(words) if not word.startswith("-")), len(words))
    top.reject_unknown_options(words[:place], "; those of a command follow its name")
    asked = words[place].replace("_", "-") if place < len(words) else None  # methods are spelled with _
    if asked is not None and asked not in commands:
        every = f"expected one of {', '.join(commands)}"
        top.error(f"unknown command {words[place]!r}{did_you_mean(asked, commands) or '; ' + every}")
    parser = make_parser(commands, [] if asked is None else [asked])
    chosen = parser
    if asked is not None:
        chosen, rest = parser.commands[asked], words[place + 1 :]
        chosen.reject_unknown_options(rest)
        if {"-h", "--help"} & {*rest}:
            from dalle2_fast.cli.help.defaults import show_defaults

            show_defaults(chosen, rest)
    args, rest = parser.parse_known_args(words)
    if rest and isinstance(getattr(args, "captions", None), list):
        # argparse leaves out the captions that follow an option which follows a caption.
        args.captions, rest = [*args.captions, *rest], []
    if rest:
        hint = "; a caption of several words needs quotes around it" if "caption" in args else ""
        chosen.error(f"unexpected: {' '.join(rest)}{hint}")
    return args, "" if asked is None else commands[asked][0]


def make_parser(
    commands: Mapping[str, tuple[str, str]], complete: Collection[str], *, aliases: bool = True
) -> Parser:
    """The parser of the command line.

    Args:
        commands: name -> (its module, its purpose).
        complete: the commands whose options are declared, for which their modules are imported. A module may
            have EXAMPLES, which `--help` shows at its end.
        aliases: whether text_diff is text-diff, too.
    """
    parser = Parser(
        prog="dalle2-fast",
        description="DALL-E 2 in PyTorch: from captions to images, and its training.",
    )
    parser.add_argument("--version", action="version", version=f"dalle2-fast {__version__}")
    _add_traceback(parser, False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (home, purpose) in commands.items():
        underscored = name.replace("-", "_")
        subparser = subparsers.add_parser(
            name,
            aliases=[underscored] if aliases and underscored != name else [],
            help=purpose,
            description=f"{purpose[0].upper()}{purpose[1:]}.",
        )
        parser.commands[name] = subparser
        if name in complete:
            module = import_module(home)
            module.add_arguments(subparser)
            _add_traceback(subparser, argparse.SUPPRESS)
            if examples := getattr(module, "EXAMPLES", None):
                subparser.formatter_class = argparse.RawDescriptionHelpFormatter
                subparser.epilog = f"examples:\n{examples}"
    return parser


def did_you_mean(word: str, known: Collection[str]) -> str:
    """"; did you mean ...?" with the nearest of the known words, or "" if none is near.

    Example:
        >>> did_you_mean("genrate", ["generate", "info"])
        '; did you mean generate?'
    """
    near = [name for name in known if len(word) > 3 and name.startswith(word)]
    near = near or difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _add_traceback(parser: argparse.ArgumentParser, default: object) -> None:
    parser.add_argument(
        "--traceback", action="store_true", default=default, help="show where in the code an error occurred"
    )
