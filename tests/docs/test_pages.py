"""README and guides: blocks of Python run, commands have the options that they name, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from dalle2_fast.cli import COMMANDS
from dalle2_fast.cli.parser import parse

ROOT = Path(__file__).parents[2]
PAGES = {page.relative_to(ROOT).as_posix(): page for page in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))}
OWN_TEST = "docs/trainers.md"  # test_trainers_page.py runs its blocks with the packages that they need
BLOCK = re.compile(r"(<!-- not run: .+ -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of this language that are to run."""
    return [code for skip, kind, code in BLOCK.findall(page.read_text()) if kind == language and not skip]


def has_python(name: str) -> bool:
    return name != OWN_TEST and bool(blocks(PAGES[name], "python"))


@pytest.mark.parametrize("name", [name for name in PAGES if has_python(name)])
def test_blocks_of_python_run(name, tmp_path, monkeypatch):
    """Catches: a name, an argument or a result that a page promises and the library does not have."""
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "page"}
    with torch.random.fork_rng(devices=[]):
        for code in blocks(PAGES[name], "python"):
            exec(compile(code, name, "exec"), names)


def commands(page: Path) -> list[str]:
    """Every command of the page that is ours, without comment, as `dalle2-fast ...`."""
    found = []
    for language in ("", "bash"):
        for line in "\n".join(blocks(page, language)).replace("\\\n", " ").splitlines():
            for part in re.split(r" && | \| ", re.sub(r"\s+#.*", "", line)):
                ours = re.search(r"(?:^|-m )(dalle2-fast|dalle2_fast)(?= )(.*)", part)
                if ours and "..." not in part:
                    found.append(re.sub(r"\s>.*", "", ours[2]).strip())
    return found


def test_commands_have_the_options_that_they_name():
    """Catches: an option that was renamed, a command that is gone."""
    count = 0
    for name, page in PAGES.items():
        for command in commands(page):
            try:
                parse(shlex.split(command), COMMANDS)
            except SystemExit as end:
                assert end.code == 0, f"{name}: dalle2-fast {command}"
            count += 1
    assert count > 20


def test_links_lead_to_files():
    """Catches: a page or a picture that was moved."""
    for name, page in PAGES.items():
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{name}: {link}"
