"""What mkdocs.yml needs beyond its plugins: pages outside docs/, links to files, and our form of docstrings.

The README is the first page of the site and stays the one copy of its text. Links are written for a reader of
the repository, from file to file. Here they become links between pages, or to the source where the file is no
page.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
# file of the repository -> its page
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}
SEVERAL = re.compile(r"^    ((?:\w+, )+\w+): (.+(?:\n {5,}.+)*)", re.MULTILINE)  # a line of Args or Raises
LINK = re.compile(r"(?<=\]\()([^)#\s]+)")


def on_files(files, config):
    """Add the pages of the repository that do not lie in docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links between files of the repository into links of the site."""
    place = page.file.src_uri
    source = next((source for source, made in PAGES.items() if made == place), f"docs/{place}")

    def target(match: re.Match) -> str:
        link = match[0]
        if "://" in link or link.startswith("mailto:"):
            return link
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        page = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if page is not None and files.get_file_from_path(page):
            return posixpath.relpath(page, posixpath.dirname(place) or ".")
        # A file that does not exist stays as it is, and mkdocs warns of it.
        return config.extra["source"] + path if (ROOT / path).exists() else link

    return LINK.sub(target, markdown)


class Source(griffe.Extension):
    """What Griffe, which reads the source and does not run it, cannot know about docstrings and classes."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Griffe wants `Examples:` where we write `Example:`, and one name per line of Args."""
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = SEVERAL.sub(_one_per_line, text)

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **_) -> None:
        """`name = function` and `name = decorator(function)` in a class are methods, not attributes."""
        for owner in _classes(pkg):
            for name, member in list(owner.members.items()):
                value = member.value if member.is_attribute and not member.docstring else None
                if isinstance(value, griffe.ExprCall) and len(value.arguments) == 1:
                    value = value.arguments[0]
                if not isinstance(value, griffe.ExprName | griffe.ExprAttribute):
                    continue
                path = value.canonical_path
                if path == member.path:  # `name = name`: the right one is that of the module
                    path = f"{owner.module.path}.{name}"
                try:
                    function = loader.modules_collection[path]
                    function = function.final_target if function.is_alias else function
                    if function.is_function:
                        owner.set_member(name, griffe.Alias(name, function, parent=owner))
                except (KeyError, griffe.AliasResolutionError):
                    continue  # a constant, or something of another package


def _one_per_line(match: re.Match) -> str:
    return "\n".join(f"    {name}: {match[2]}" for name in match[1].split(", "))


def _classes(where: griffe.Object) -> Iterator[griffe.Class]:
    for member in list(where.members.values()):
        if member.is_alias:
            continue
        if member.is_class:
            yield member
        if member.is_module:
            yield from _classes(member)
