"""The files about the project agree with it: versions, links, what the workflows run, declarations."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from dalle2_fast import __version__

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/install.md",
         "examples/README.md"]  # fmt: skip
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="tomllib is part of Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_the_same_everywhere():
    """Catches: a release whose change log or citation is that of the version before."""
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    sections = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == "Unreleased" and __version__ in sections
    assert len(set(sections)) == len(sections)


def test_the_change_log_has_the_form_that_tools_read():
    """Catches: a kind of change that Keep a Changelog does not have, a version without a date or a link."""
    text = (ROOT / "CHANGELOG.md").read_text()
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for version, date in re.findall(r"^## \[(.+?)\](.*)$", text, re.MULTILINE):
        assert version == "Unreleased" or re.fullmatch(r" - \d{4}-\d\d-\d\d", date)
        assert f"\n[{version}]: https://" in text


@pytest.mark.parametrize("page", PAGES)
def test_links_between_files_lead_somewhere(page):
    """Catches: a page that was moved or renamed, and the link that still names it."""
    path = ROOT / page
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.name)
def test_issue_forms_are_read(form):
    """Catches: a form with an error, which GitHub leaves out without a word."""
    text = yaml.safe_load(form.read_text())
    if form.name == "config.yml":
        assert text["blank_issues_enabled"] in (True, False)
        return
    assert text["name"] and text["description"]
    names = [part["id"] for part in text["body"] if part["type"] != "markdown"]
    assert names and len(set(names)) == len(names)
    assert all(part["attributes"]["label"] for part in text["body"] if part["type"] != "markdown")


def test_the_workflow_does_what_ci_does():
    """Catches: a second definition of "passes" that drifts away from .ci/run."""
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]
    runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert runs == ["bash .ci/run"]


def test_declared_pythons_are_those_of_the_wheels():
    """Catches: a Python that pip accepts and for which no wheel is built, or that no classifier names."""
    project = pyproject()["project"]
    named = {line.rpartition(" ")[2] for line in project["classifiers"] if re.search(r":: 3\.\d+$", line)}
    wheels = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())
    assert set(wheels["jobs"]["wheel"]["strategy"]["matrix"]["python"]) == named
    oldest = min(named, key=lambda version: int(version.partition(".")[2]))
    assert project["requires-python"] == f">={oldest}"
    assert pyproject()["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in named


def test_every_example_is_listed():
    """Catches: an example that the page does not name, or a name without a file."""
    listed = re.findall(r"`(\w+\.py)`", (ROOT / "examples" / "README.md").read_text())
    assert set(listed) == {path.name for path in (ROOT / "examples").glob("*.py")}
