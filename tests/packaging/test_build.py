"""setup.py builds `dalle2_fast._C` in every kind of install, again after each edit, and says what is missing.

The sources here are toys that compile in a second; the install that these tests run in shows that csrc/
itself builds. A stand-in for nvcc logs how it is called.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.installs import attempt, build, contents, copy_checkout, make_environment, pip_install, run

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)

MODULE = """
#include <Python.h>
#include "build_facts.h"
#include "one.h"
int two();
#ifdef DALLE2_FAST_HAS_SM90_TOY
int hopper();
#else
int hopper() { return 0; }
#endif

static PyObject* build_info(PyObject*, PyObject*) {
    PyObject* json = PyImport_ImportModule("json");
    PyObject* facts = json ? PyObject_CallMethod(json, "loads", "s", DALLE2_FAST_FACTS) : nullptr;
    Py_XDECREF(json);
    return facts;
}
static PyMethodDef methods[] = {{"build_info", build_info, METH_NOARGS, ""}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", "", -1, methods};
PyMODINIT_FUNC PyInit__C() {
    PyObject* module = PyModule_Create(&definition);
    PyModule_AddIntConstant(module, "sum", ONE + two() + hopper());
    return module;
}
"""
SOURCES = {
    "module.cpp": MODULE,
    "one.h": "#define ONE 1\n",
    "two.h": "#define TWO 2\n",
    "cpu/two.cpp": '#include "two.h"\nint two() { return TWO; }\n',
    "cuda/toy.cu": "int everywhere() { return 1; }\n",
    "sm90/toy.cu": "int hopper() { return 90; }\n",  # the same name in another folder
}
SUM = "import dalle2_fast._C as C; print(C.sum)"
FACTS = "import json, dalle2_fast._C as C; print(json.dumps(C.build_info()))"
NVCC = """#!/bin/sh
echo "$@" >> "$0.log"
case "$1" in
--version) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit;;
--list-gpu-code) echo "sm_80 sm_86 sm_89 sm_90 sm_100"; exit;;
esac
for word; do
    shift
    case "$word" in
    -gencode=* | --expt-* | --threads=* | -X* | -cudart=*) ;;
    *.cu) set -- "$@" -x c++ "$word";;
    *) set -- "$@" "$word";;
    esac
done
exec c++ -fPIC "$@"
"""


def checkout(folder: Path) -> Path:
    tree = copy_checkout(folder)
    shutil.rmtree(tree / "csrc")
    (tree / "csrc").mkdir()
    for name, text in SOURCES.items():
        (tree / "csrc" / name).parent.mkdir(exist_ok=True)
        (tree / "csrc" / name).write_text(text)
    return tree


def rebuild(tree: Path, **environment: str) -> list[str]:
    """Build in place and return which sources, relative to csrc/, were compiled."""
    built = run([sys.executable, "setup.py", "build_ext", "--inplace"], tree, **environment)
    return sorted(re.findall(r"\] (?:C\+\+|CUDA) csrc/(\S+)", built))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Its path has a blank."""
    return checkout(tmp_path_factory.mktemp("a checkout") / "tree")


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"), DALLE2_FAST_NATIVE="cpu")


def native(wheel: Path) -> set[str]:
    return {name for name in contents(wheel) if name.startswith("dalle2_fast/_C.")}


def test_a_wheel_has_the_module_and_a_checkout_that_hides_it_is_named(tree, wheel, tmp_path):
    assert len(native(wheel)) == 1 and not any("csrc" in name for name in contents(wheel))
    assert "-py3-none-any" not in wheel.name
    python = make_environment(tmp_path / "venv")
    pip_install(python, wheel)
    assert run([python, "-c", SUM], cwd=tmp_path) == "3\n"
    absent = "from dalle2_fast.ops import _native; print(_native.WHY_ABSENT)"
    assert run([python, "-c", absent], cwd=tmp_path) == "None\n"
    hidden = checkout(tmp_path / "hides")
    message = run([python, "-c", absent], cwd=hidden)
    assert f"{hidden / 'dalle2_fast'} hide the installed package in {tmp_path / 'venv'}" in message


def test_an_editable_install_rebuilds_what_an_edit_touches_and_nothing_else(tree, wheel, tmp_path):
    """A forgotten header leaves an old object; compiling everything at each install costs minutes."""
    python = make_environment(tmp_path / "venv")
    pip_install(python, "-e", tree, DALLE2_FAST_NATIVE="cpu")
    assert run([python, "-c", SUM], cwd=tmp_path) == "3\n"
    assert rebuild(tree, DALLE2_FAST_NATIVE="cpu") == []  # the wheel's and the editable install's objects
    (tree / "csrc" / "two.h").write_text("#define TWO 20\n")
    assert rebuild(tree, DALLE2_FAST_NATIVE="cpu") == ["cpu/two.cpp"]
    assert run([python, "-c", SUM], cwd=tmp_path) == "21\n"
    (tree / "csrc" / "three.cpp").write_text("int three() { return 3; }\n")
    assert rebuild(tree, DALLE2_FAST_NATIVE="cpu") == ["three.cpp"]


def test_nvcc_compiles_each_file_for_the_gpus_of_its_folder(tree):
    """Plain sm_90 does not have the instructions of Hopper's tensor cores."""
    toolkit = tree / "some cuda"
    (toolkit / "bin").mkdir(parents=True)
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    cuda = {"DALLE2_FAST_NATIVE": "cuda", "CUDA_HOME": str(toolkit)}
    assert {"cuda/toy.cu", "sm90/toy.cu", "module.cpp"} <= set(rebuild(tree, **cuda))
    assert run([sys.executable, "-c", "import dalle2_fast._C as C; print(C.sum >= 90)"], cwd=tree) == "True\n"
    facts = json.loads(run([sys.executable, "-c", FACTS], cwd=tree))
    assert facts["cuda"] == "13.0" and facts["why_no_cuda"] is None
    # This nvcc does not know sm_120.
    targets = {"cuda/toy.cu": ["80+PTX", "86", "89", "90a", "100"], "sm90/toy.cu": ["90a"]}
    assert facts["targets"] == targets
    calls = nvcc.with_name("nvcc.log").read_text().splitlines()
    (hopper,) = (call for call in calls if "csrc/sm90/toy.cu" in call)
    assert re.findall(r"-gencode=(\S+)", hopper) == ["arch=compute_90a,code=sm_90a"]
    (everywhere,) = (call for call in calls if "csrc/cuda/toy.cu" in call)
    # (front end, machine code): one run of the front end per target would take a tenth of the build.
    codes = re.findall(r"arch=compute_(\w+),code=(\w+)", everywhere)
    assert codes == [("80", "sm_80"), ("80", "compute_80"), ("80", "sm_86"), ("80", "sm_89"),
                     ("90a", "sm_90a"), ("100", "sm_100")]  # fmt: skip
    assert any("-shared -cudart=static" in call for call in calls)

    assert rebuild(tree, **cuda) == []
    # A file whose GPU is not among the targets is left out, and the other files can test for it.
    assert rebuild(tree, **cuda, DALLE2_FAST_TARGETS="89") == ["cuda/toy.cu", "module.cpp"]
    facts = json.loads(run([sys.executable, "-c", FACTS], cwd=tree))
    assert facts["targets"] == {"cuda/toy.cu": ["89"]}
    for targets in ("sm_90", "35"):
        wrong = cuda | {"DALLE2_FAST_NATIVE": "auto", "DALLE2_FAST_TARGETS": targets}
        failed = attempt([sys.executable, "setup.py", "build_ext"], tree, **wrong)
        assert failed.returncode != 0 and "DALLE2_FAST_TARGETS" in failed.stderr


def test_missing_tools_are_reported(tree, tmp_path):
    """Without a compiler the rest of the package still installs, unless the native module is required."""
    bare = {"PATH": str(tmp_path), "CXX": ""}
    wheel = build("wheel", tree, tmp_path / "wheel", **bare, DALLE2_FAST_NATIVE="auto")
    assert native(wheel) == set() and "dalle2_fast/reference.py" in contents(wheel)
    command = [sys.executable, "setup.py", "build_ext"]
    skipped = attempt(command, tree, **bare, DALLE2_FAST_NATIVE="auto")
    assert skipped.returncode == 0 and "no C++ compiler" in skipped.stdout + skipped.stderr
    for choice in ("cpu", "cuda"):
        failed = attempt(command, tree, **bare, DALLE2_FAST_NATIVE=choice)
        assert failed.returncode != 0 and "error: no C++ compiler: install g++" in failed.stderr
        assert "Traceback" not in failed.stderr
    failed = attempt(command, tree, DALLE2_FAST_NATIVE="yes")
    assert failed.returncode != 0 and "expected auto, cuda, cpu or none, got 'yes'" in failed.stderr


def test_cuda_that_was_asked_for_fails_without_nvcc(tmp_path):
    tree, tools = checkout(tmp_path / "tree"), tmp_path / "tools"
    script = (tree / "setup.py").read_text()
    assert "/usr/local/cuda/bin" in script  # there may be one on this machine
    (tree / "setup.py").write_text(script.replace("/usr/local/cuda/bin", "/nowhere"))
    tools.mkdir()
    for name in ("c++", "ninja"):
        found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
        (tools / name).symlink_to(found or pytest.skip(f"needs {name}"))
    command = [sys.executable, "setup.py", "build_ext"]
    failed = attempt(command, tree, PATH=str(tools), CXX="", DALLE2_FAST_NATIVE="cuda")
    assert failed.returncode != 0 and "error: DALLE2_FAST_NATIVE=cuda, but no nvcc" in failed.stderr


def test_code_that_does_not_compile_fails_the_install(tmp_path):
    """A missing tool is only a warning; a compile error must not be taken for one."""
    tree = checkout(tmp_path / "tree")
    (tree / "csrc" / "cpu" / "two.cpp").write_text("int two() { return 2 }\n")
    for name in ("cuda/toy.cu", "sm90/toy.cu"):
        (tree / "csrc" / name).unlink()  # "auto" would compile them with a real nvcc
    failed = attempt([sys.executable, "setup.py", "build_ext"], tree, DALLE2_FAST_NATIVE="auto")
    assert failed.returncode != 0 and "two.cpp:1" in failed.stdout
