"""The site: every public name is on an API page, it builds without a warning, no page needs another host."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.docs.public_names import ADAPTED, CALLABLES, EXPORTED, MEMBERS, find

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "mkdocs.yml").exists():
    pytest.skip("the site is built from a checkout", allow_module_level=True)

API = "\n".join(page.read_text() for page in sorted((ROOT / "docs" / "api").glob("*.md")))
NAMED = re.findall(r"^::: (\S+)$", API, re.MULTILINE)
TOOLS = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers")  # the extra docs


def test_every_public_name_is_on_an_api_page():
    """Catches: a new public name without a place in the documentation, a name that is on two pages."""
    assert len(set(NAMED)) == len(NAMED)
    shown = {id(find(name)) for name in NAMED if callable(find(name))}
    # Classes that exist only together with another package have a title instead of their public path.
    titles = re.findall(r"^      heading: (\w+)$", API, re.MULTILINE)
    missing = []
    for module, names in EXPORTED.items():
        for name in names:
            whole = f"{module}.{name}"
            if whole in NAMED or (module in ADAPTED and name in titles):
                continue
            if not callable(find(whole)) or id(find(whole)) not in shown:
                missing.append(whole)
    assert not missing


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    missing = [tool for tool in TOOLS if importlib.util.find_spec(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed (the extra docs)")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_built_pages_have_every_public_name_and_method(site):
    """Catches: a docstring that the page leaves out, a method that was assigned and that Griffe misses."""
    inventory = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    shown = {line.split()[0] for line in inventory.splitlines()}
    public = [name for name in CALLABLES if name in NAMED]
    wanted = {f"{name}.{member}" for name in public for member in documented_members(name)} | set(public)
    assert not sorted(wanted - shown) and len(wanted) > 200


def documented_members(name: str) -> list[str]:
    owned = (whole.rpartition(".") for whole, function in MEMBERS.items() if function.__doc__)
    return [member for owner, _, member in owned if owner == name and member != "__init__"]


def test_public_constants_are_documented(site):
    """Catches: a constant without a docstring below it, which an editor and the page show as a bare value."""
    import griffe

    package = griffe.load("dalle2_fast", search_paths=[str(ROOT)], allow_inspection=False)
    constants = [name for name in NAMED if not callable(find(name)) or name.endswith(".Tokenizer")]
    silent = [name for name in constants if not package[name.removeprefix("dalle2_fast.")].has_docstring]
    assert not silent and len(constants) > 5


# ------------------------------------------------------------------------------------------ what a page loads

# Kinds of <link> that name an address, which no browser fetches.
NOT_LOADED = {"canonical", "prev", "next", "alternate", "license", "author"}
ADDRESS = re.compile(r"^(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
IN_STYLES = re.compile(r"""(?:url\(|@import)\s*["']?([^"')\s]+)""")


class Loads(HTMLParser):
    """The addresses that a browser fetches for a page, without those of links that a reader has to click."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if "mermaid" in (values.get("class") or "").split():
            self.addresses.append(
                "https://unpkg.com/mermaid"
            )  # the theme's script fetches it for such a block
        if values.get("data-md-component") == "source":
            self.addresses.append("https://api.github.com")  # and the number of stars for a repository
        if tag == "link" and not NOT_LOADED & set((values.get("rel") or "").split()):
            self.addresses.append(values.get("href") or "")
        if tag not in ("a", "link", "form"):
            self.addresses += [value for key, value in attrs if key in ("src", "data", "poster") and value]
            self.addresses += [
                part.split()[0] for part in (values.get("srcset") or "").split(",") if part.strip()
            ]
        self.addresses += IN_STYLES.findall(values.get("style") or "")


def from_elsewhere(page: str) -> list[str]:
    return [address for address in Loads(page).addresses if ADDRESS.match(address)]


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://cdn.example/a.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/css">',
        '<img alt="" src="http://a.example/badge.svg">',
        '<p style="background: url(https://a.example/a.png)">',
        '<pre class="mermaid"><code>flowchart</code></pre>',
    ],
)
def test_what_a_browser_would_fetch_is_found(page):
    assert from_elsewhere(page)
    assert not from_elsewhere(
        '<a href="https://a.example">a</a><img src="a.png"><link rel="canonical" href="//a">'
    )


def test_pages_load_nothing_from_another_host(site):
    """Catches: fonts, scripts, badges or pictures that tell another host who reads the documentation."""
    pages = sorted(site.rglob("*.html"))
    found = {page.name: from_elsewhere(page.read_text()) for page in pages}
    assert not {name: addresses for name, addresses in found.items() if addresses} and len(pages) > 25
    styles = "\n".join(style.read_text() for style in site.rglob("*.css"))
    assert not [address for address in IN_STYLES.findall(styles) if ADDRESS.match(address)]


def test_links_between_pages_are_links_of_the_site(site):
    """Catches: a link from the README or a guide to a page that leads into the repository, or to nothing."""
    assert 'href="install.html"' in (site / "index.html").read_text()
    assert 'src="main-job.png"' in (site / "index.html").read_text()
    assert "examples.html" in (site / "trainers.html").read_text()
    assert "/source/blob/main/benchmarks/results/" in (site / "measured.html").read_text()
