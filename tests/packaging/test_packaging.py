"""`dalle2_fast.kernels` and the pretrained data are part of every kind of install, and nothing else is.

Each case works on a copy of the tree with a stand-in for the (large) checkpoint, without a network. The
native module is left out; test_build.py covers it.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.installs import (
    DATA,
    ROOT,
    attempt,
    build,
    contents,
    copy_checkout,
    make_environment,
    pip_install,
    run,
)

WHERE = "import dalle2_fast.kernels._op as op, dalle2_fast; print(op.__file__); print(dalle2_fast.__file__)"


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("checkout") / "tree")


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


def test_kernels_is_a_relative_symlink_without_init():
    """An absolute link breaks in every other checkout; an __init__.py hijacks the package called kernels."""
    link = ROOT / "dalle2_fast" / "kernels"
    assert link.is_symlink() and os.readlink(link) == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_holds_every_module_and_the_data_and_nothing_else(tree, wheel):
    modules = {str(path.relative_to(tree)) for path in (tree / "dalle2_fast").rglob("*.py")}
    modules |= {f"dalle2_fast/{path.relative_to(tree)}" for path in (tree / "kernels").rglob("*.py")}
    assert "dalle2_fast/kernels/_op.py" in modules
    merges = {f"dalle2_fast/data/text/clip_merges.{name}" for name in ("txt.gz", "LICENSE.txt")}
    assert contents(wheel) == modules | merges | {DATA, "dalle2_fast/py.typed"}
    notices = {name for name in zipfile.ZipFile(wheel).namelist() if "/licenses/" in name}
    assert {name.partition("/licenses/")[2] for name in notices} == {
        "LICENSE", "dalle2_fast/data/text/clip_merges.LICENSE.txt"
    }  # fmt: skip


def test_sdist_builds_the_same_wheel(tree, wheel, tmp_path):
    """An sdist that stores the symlink, or loses the data, builds a different wheel."""
    sdist = build("sdist", tree, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        assert not [member.name for member in archive if re.search(r"/tests/|__pycache__|\.so$", member.name)]
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    sources = [path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert any(source.suffix == ".cuh" for source in sources)
    for source in sources:  # headers, too
        assert (unpacked / source).is_file(), source
    assert contents(build("wheel", unpacked, tmp_path / "wheel")) == contents(wheel)


def test_installed_wheel_runs_elsewhere(wheel, tmp_path):
    python = make_environment(tmp_path / "venv")
    pip_install(python, wheel)
    kernels, package = run([python, "-c", WHERE], cwd=tmp_path).split()
    assert kernels.startswith(str(tmp_path / "venv")) and package.startswith(str(tmp_path / "venv"))
    assert (Path(package).parent / "pretrained/scenes/config.json").is_file()
    assert (tmp_path / "venv" / "bin" / "dalle2-fast").is_file()


def test_editable_install_runs_at_the_root_and_elsewhere(tree, tmp_path):
    python = make_environment(tmp_path / "venv")
    pip_install(python, "-e", tree)
    for cwd in (tree, tmp_path):
        kernels, package = run([python, "-c", WHERE], cwd=cwd).split()
        assert Path(package).samefile(tree / "dalle2_fast/__init__.py")
        assert Path(kernels).samefile(tree / "kernels/_op.py")


def test_another_package_called_kernels_is_not_hidden_at_the_root(tree, tmp_path):
    python = make_environment(tmp_path / "venv")
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text("mine = False\n")
    found = run([python, "-c", "import kernels; print(kernels.__file__)"], cwd=tree)
    assert found.strip() == str(site / "kernels" / "__init__.py")


def without_links(tree: Path) -> Path:
    """The checkout as GitHub's ZIP and a git without symbolic links unpack it."""
    link = tree / "dalle2_fast" / "kernels"
    link.unlink()
    link.write_text("../kernels")
    return tree


def test_a_copy_without_symbolic_links_builds_the_same_wheel(wheel, tmp_path):
    """It succeeded without the kernels, and every command failed."""
    copy = without_links(copy_checkout(tmp_path / "tree"))
    assert contents(build("wheel", copy, tmp_path / "wheel")) == contents(wheel)


# A file system without links, for the build that imports this module first.
NO_LINKS = """
import os

def symlink(*args, **kwargs):
    raise OSError(1, "Operation not permitted")

os.symlink = symlink
"""


def test_a_file_system_without_links_builds_the_same_wheel(wheel, tmp_path):
    """Catches: a build that needs links, and an editable install that lacks the kernels."""
    copy = without_links(copy_checkout(tmp_path / "tree"))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_LINKS)
    no_links = {"PYTHONPATH": str(tmp_path / "site")}
    assert contents(build("wheel", copy, tmp_path / "wheel", **no_links)) == contents(wheel)
    assert (copy / "dalle2_fast" / "kernels").is_file()
    failed = attempt([sys.executable, "setup.py", "build_ext", "--inplace"], copy, **no_links)
    assert failed.returncode != 0 and failed.stderr.count("\n") == 1
    assert "an editable install needs a symbolic link to ../kernels" in failed.stderr


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("dalle2_fast/kernels", "dalle2_fast/kernels/_op.py is missing"),
        ("csrc", "csrc/module.cpp is missing"),
        ("dalle2_fast/pretrained", "dalle2_fast/pretrained/scenes/config.json is missing"),
        ("dalle2_fast/data/text/clip_merges.txt.gz", "clip_merges.txt.gz is missing"),
    ],
)
def test_an_incomplete_copy_fails_with_one_sentence(tmp_path, missing, says):
    """A build that succeeds without a part of the package fails its users later."""
    copy = copy_checkout(tmp_path / "tree")
    path = copy / missing
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    failed = attempt([sys.executable, "setup.py", "bdist_wheel"], copy, DALLE2_FAST_NATIVE="auto")
    assert failed.returncode != 0 and failed.stderr.count("\n") == 1
    assert says in failed.stderr


def test_weights_that_git_lfs_has_not_fetched_fail_with_one_sentence(tmp_path):
    copy = copy_checkout(tmp_path / "tree")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 99\n"
    (copy / DATA).with_name("model.safetensors").write_text(pointer)
    failed = attempt([sys.executable, "setup.py", "bdist_wheel"], copy)
    assert failed.returncode != 0 and failed.stderr.count("\n") == 1
    assert "model.safetensors is a Git LFS pointer, not the file: run git lfs pull" in failed.stderr


def test_the_build_reads_its_declarations_without_fcntl(tree):
    """Windows does not have that module: the import at the top ended every install there."""
    code = "import sys, runpy; sys.modules['fcntl'] = None; sys.argv = ['setup.py', '--name']; "
    assert "dalle2-fast" in run([sys.executable, "-c", code + "runpy.run_path('setup.py')"], tree)


def test_ci_runs_the_commands_of_the_readme():
    """The README promises two lines; CI must run exactly those."""
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    block = re.search(r"## Install and run\n.*?```\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    lines = block[1].strip().splitlines()
    assert len(lines) == 2
    for command in (command for line in lines for command in line.split(" && ")):
        assert re.search(rf"^(OMP_NUM_THREADS=1 )?{re.escape(command)}$", ci, re.MULTILINE), command
