"""The packages and the native module. Everything else about the project is declared in pyproject.toml.

`dalle2_fast/kernels` is a relative symlink to `kernels/`, and `kernels/` has no `__init__.py`, so the
namespace search below finds it as `dalle2_fast.kernels` in a wheel, an sdist and an editable install. To map
the name by `package_dir` instead breaks one of these cases, and an `__init__.py` in the top-level `kernels/`
would hide the package of that name from every program that runs in this folder. tests/packaging covers each
case.

`dalle2_fast._C` is built from csrc/ with ninja: every .cpp file, and, if nvcc is found, every .cu file. The
folder of a .cu file decides for which GPUs it is compiled: `csrc/sm90/` for compute capability 9.0 only, any
other folder for all targets. The module takes raw pointers, so it needs no torch at build time. After an edit
run `python setup.py build_ext --inplace`. These environment variables are read at build time only:

    DALLE2_FAST_NATIVE   auto: build what the installed tools can build; cuda: fail without nvcc; cpu: build
                         without CUDA, and fail without a C++ compiler; none: Python and Triton only
    DALLE2_FAST_TARGETS  GPUs, by default 80+PTX;86;89;90a;100;120 (+PTX: newer GPUs can run the code, too)
    CUDA_HOME, CXX, CXXFLAGS, LDFLAGS  as usual
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OBJECTS = Path("build", f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}")  # below ROOT
NATIVE = os.environ.get("DALLE2_FAST_NATIVE", "auto")
TARGETS = os.environ.get("DALLE2_FAST_TARGETS", "80+PTX;86;89;90a;100;120")
MACOS = sys.platform == "darwin"
FLAGS = ["-std=c++17", "-O3", "-Icsrc", f"-I{OBJECTS}"]


def find_sources(suffix: str) -> list[str]:
    """The source files with this suffix, relative to csrc/."""
    return sorted(path.relative_to(CSRC).as_posix() for path in CSRC.rglob(f"*{suffix}"))


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def find_compiler() -> tuple[str, str]:
    """The command of the C++ compiler, and the first line of its --version."""
    for command in [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(command)[0]):
            return command, output_of(*shlex.split(command), "--version").partition("\n")[0].strip()
    raise PlatformError("no C++ compiler: install g++ or clang++, or name one in CXX")


def find_ninja() -> str:
    # Not ninja.BIN_DIR: in an isolated build it names the folder of another environment. The system's ninja
    # comes second: before version 1.12, ninja takes a file that is edited during its compilation for done.
    found = shutil.which("ninja", path=str(Path(sys.executable).parent)) or shutil.which("ninja")
    if found is None:
        raise PlatformError("ninja is not installed: pip install ninja")
    return found


def find_pybind11() -> Path:
    try:
        import pybind11
    except ImportError:
        raise PlatformError("pybind11 is not installed: pip install pybind11") from None
    # An isolated build has pybind11 in a new folder each time. A link named after its version keeps the
    # compile command, and so ninja's decision, the same.
    link = OBJECTS / f"pybind11-{pybind11.__version__}"
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(pybind11.get_include())
    except OSError:  # a file system without links: an isolated build then compiles everything again
        return Path(pybind11.get_include())
    return link


def find_python() -> list[str]:
    """The folders of Python.h and of the headers that it includes."""
    folders = [sysconfig.get_paths()[name] for name in ("include", "platinclude")]
    if not Path(folders[0], "Python.h").is_file():
        raise PlatformError(f"Python.h is not in {folders[0]}: install python3-dev, or what provides it here")
    return folders


def find_nvcc() -> tuple[str | None, str]:
    """nvcc and its version, or None and the reason why there is none."""
    if NATIVE == "cpu":
        return None, "left out by DALLE2_FAST_NATIVE=cpu"
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    search_paths = [f"{home}/bin" for home in homes if home] + [None, "/usr/local/cuda/bin"]  # None: PATH
    for search_path in search_paths:
        nvcc = shutil.which("nvcc", path=search_path)
        version = re.search(r"release ((\d+)\.\d+)", output_of(nvcc, "--version")) if nvcc else None
        if version and int(version[2]) >= 12:  # the first that knows sm_90a
            return nvcc, version[1]
    if NATIVE == "cuda":
        raise PlatformError(
            "DALLE2_FAST_NATIVE=cuda, but no nvcc 12 or newer in CUDA_HOME, on PATH or in "
            "/usr/local/cuda: install the CUDA toolkit or unset the variable"
        )
    return None, "no nvcc 12 or newer in CUDA_HOME, on PATH or in /usr/local/cuda"


def choose_targets(nvcc: str) -> dict[str, list[str]]:
    """{.cu file: its targets}: all that nvcc knows, or, for a file in csrc/sm<N>/, only those of GPU <N>.

    Plain sm_90 lacks the instructions that the files in csrc/sm90/ use, hence the target 90a. A file without
    a target is left out, and so are the functions that it defines (see build_facts).
    """
    known = output_of(nvcc, "--list-gpu-code").split()
    targets = [target for target in re.split(r"[;, ]+", TARGETS) if target]
    malformed = [target for target in targets if not re.fullmatch(r"\d+[af]?(\+PTX)?", target)]
    if malformed or not targets:
        raise SystemExit(f"DALLE2_FAST_TARGETS: expected a form like 80+PTX;90a, got {TARGETS!r}")
    # nvcc lists sm_90, not sm_90a.
    usable = [target for target in targets if f"sm_{re.match('[0-9]+', target)[0]}" in known]
    chosen = {}
    for source in find_sources(".cu"):
        only = re.fullmatch(r"sm(\d+)", Path(source).parent.name)
        selected = [target for target in usable if only is None or re.match(r"\d+", target)[0] == only[1]]
        if selected:
            chosen[source] = selected
        elif only is None:
            raise SystemExit(f"nvcc here compiles for none of DALLE2_FAST_TARGETS={TARGETS!r}")
    return chosen


def generate_code(targets: list[str]) -> list[str]:
    """nvcc's -gencode flags.

    Plain targets of one generation (80, 86, 89) share the PTX of the lowest, so that the front end, which
    takes longer than the generation of machine code, runs once for all of them. With nvcc 13.0 only the order
    of a few instructions on sm_86 depends on this.
    """
    numbers = [target.removesuffix("+PTX") for target in targets]
    lowest = {}
    for number in sorted(filter(str.isdecimal, numbers), key=int):
        lowest.setdefault(int(number) // 10, number)
    flags = []
    for target, number in zip(targets, numbers, strict=True):
        virtual = lowest[int(number) // 10] if number.isdecimal() else number
        flags.append(f"-gencode=arch=compute_{virtual},code=sm_{number}")
        if number != target:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:  # ninja compares modification times
        path.write_text(text)


def build_facts(compiler: str, cuda: str | None, why_no_cuda: str, targets: dict[str, list[str]]) -> str:
    """build_facts.h: what module.cpp reports, and a macro for each .cu file that is compiled.

    The macro of cuda/contrastive.cu is DALLE2_FAST_HAS_CUDA_CONTRASTIVE.
    """
    facts = {"compiler": compiler, "cuda": cuda, "why_no_cuda": why_no_cuda or None, "targets": targets}
    lines = ["#pragma once", f'#define DALLE2_FAST_FACTS R"json({json.dumps(facts)})json"']
    for source in targets:
        name = "_".join(Path(source).with_suffix("").parts)
        lines.append(f"#define DALLE2_FAST_HAS_{name.upper()} 1")
    return "\n".join(lines) + "\n"


def ninja_file(
    compiler: str, nvcc: str | None, cuda: str, targets: dict[str, list[str]], module: Path
) -> str:
    """The rules of the build.

    Paths are relative to ROOT, where ninja runs, so they contain no blank and a checkout can be moved. The
    object of cuda/contrastive.cu is cuda/contrastive.cu.o: files of the same name in different folders do not
    collide.
    """

    def quote(parts: list[str]) -> str:
        return shlex.join(map(str, parts)).replace("$", "$$")

    includes = [f"-isystem{path}" for path in (find_pybind11(), *find_python())]
    user_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
    cxx = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread", *FLAGS, *includes, *user_flags]
    shared = "-bundle -undefined dynamic_lookup" if MACOS else "-shared -pthread -Wl,--exclude-libs,ALL"
    link = f"{compiler} {shared}"
    lines = [
        f"builddir = {OBJECTS}",
        "rule cxx",
        f"  command = {compiler} -MMD -MF $out.d {quote(cxx)} -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = C++ $in",
    ]
    if nvcc:
        link = f"{shlex.quote(nvcc)} -shared -cudart=static -Xcompiler=-pthread -Xlinker=--exclude-libs,ALL"
        # The version makes ninja compile again after an update of CUDA. Compressed and without -lineinfo the
        # code is a ninth as large; for a profile, set NVCC_APPEND_FLAGS=-lineinfo.
        cu = [f"-DDALLE2_FAST_NVCC={cuda}", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all"]
        cu += ["--threads=0", "--expt-relaxed-constexpr", *FLAGS]
        lines += [
            "rule cu",
            f"  command = {shlex.quote(nvcc)} -MMD -MF $out.d {quote(cu)} $targets -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = CUDA $in",
        ]
    lines += [
        "rule link",
        f"  command = {link} $in -o $out {os.environ.get('LDFLAGS', '')}",
        "  description = link $out",
    ]
    objects = []  # CUDA's first, because they take longest
    for source, selected in targets.items():
        objects.append(f"{OBJECTS / source}.o")
        lines += [f"build {objects[-1]}: cu csrc/{source}", f"  targets = {quote(generate_code(selected))}"]
    for source in find_sources(".cpp"):
        objects.append(f"{OBJECTS / source}.o")
        lines.append(f"build {objects[-1]}: cxx csrc/{source}")
    lines.append(f"build {module}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Compiles with ninja. Objects stay in build/ for every kind of install, so only changes are compiled."""

    def build_extension(self, extension: Extension) -> None:
        if os.name == "nt":
            raise PlatformError("dalle2_fast._C is for Linux and macOS; without it the ops run in PyTorch")
        import fcntl  # Windows does not have it

        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        OBJECTS.mkdir(parents=True, exist_ok=True)
        with open(OBJECTS / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at the same time run one after the other
            try:
                built = self.run_ninja()
            except Exception:
                target.unlink(missing_ok=True)  # the module of an earlier build must not get into the wheel
                raise
            shutil.copy2(built, target.with_suffix(".new"))
            target.with_suffix(".new").replace(target)

    def run_ninja(self) -> Path:
        compiler, name = find_compiler()
        ninja = find_ninja()
        nvcc, cuda = find_nvcc()
        targets = choose_targets(nvcc) if nvcc else {}
        module = OBJECTS / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        rules = ninja_file(compiler, nvcc, cuda, targets, module)
        facts = build_facts(name, cuda if nvcc else None, "" if nvcc else cuda, targets)
        write_if_changed(OBJECTS / "build.ninja", rules)
        write_if_changed(OBJECTS / "build_facts.h", facts)
        summary = f"CUDA {cuda} for {TARGETS}" if nvcc else f"no CUDA ({cuda})"
        print(f"dalle2_fast._C: {name}; {summary}", file=sys.stderr, flush=True)
        if subprocess.run([ninja, "-f", OBJECTS / "build.ninja"]).returncode != 0:
            hint = "; DALLE2_FAST_NATIVE=cpu builds without CUDA" if nvcc else ""
            self.extensions[0].optional = False  # a missing tool is only a warning, a compile error is not
            raise CompileError(f"dalle2_fast._C does not compile: see above{hint}")
        return module


def complete_checkout() -> dict[str, str]:
    """Where the packages are, for `package_dir`; ends the build with one sentence if a part is missing.

    Where symbolic links are not unpacked (GitHub's ZIP, git with core.symlinks=false), dalle2_fast/kernels is
    a file with the link's target as its text. It is made the link that it stands for. On a file system
    without links a wheel takes the modules from kernels/, and an editable install is refused.
    """
    # The default, said explicitly: setuptools then makes an editable install a plain path, which type
    # checkers can follow, and not an import hook, which they cannot.
    places = {"": "."}
    link = ROOT / "dalle2_fast" / "kernels"
    if link.is_file() and link.read_text().strip() == "../kernels":
        temporary = link.with_name("kernels.link")
        try:
            temporary.symlink_to("../kernels", target_is_directory=True)
            temporary.replace(link)
            print("dalle2_fast/kernels: made the symbolic link that it was unpacked without", file=sys.stderr)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if {"develop", "editable_wheel", "--inplace"} & set(sys.argv):
                raise SystemExit(
                    "dalle2_fast/kernels: an editable install needs a symbolic link to ../kernels here, and "
                    f"none can be made ({error.strerror}): pip install without -e, or copy the folder there"
                ) from None
            places["dalle2_fast.kernels"] = "kernels"
    kernels = places.get("dalle2_fast.kernels", "dalle2_fast/kernels")
    needed = [f"{kernels}/_op.py", "dalle2_fast/pretrained/scenes/config.json"]
    needed += ["dalle2_fast/data/text/clip_merges.txt.gz"] + ([] if NATIVE == "none" else ["csrc/module.cpp"])
    for name in needed:
        if not (ROOT / name).is_file():
            raise SystemExit(f"{name} is missing: this copy of the sources is not complete; clone it again")
    for path in (ROOT / "dalle2_fast" / "pretrained").rglob("*"):
        if path.is_file() and path.open("rb").read(40).startswith(b"version https://git-lfs"):
            raise SystemExit(f"{path.relative_to(ROOT)} is a Git LFS pointer, not the file: run git lfs pull")
    return places


def find_packages(places: dict[str, str]) -> list[str]:
    # pretrained/ is data, not code: without the exclusion its folders would be listed as packages.
    packages = find_namespace_packages(include=["dalle2_fast*"], exclude=["dalle2_fast.pretrained*"])
    for name, folder in places.items():
        if name:
            packages += [name, *(f"{name}.{inner}" for inner in find_namespace_packages(folder))]
    return packages


if NATIVE not in ("auto", "cuda", "cpu", "none"):
    raise SystemExit(f"DALLE2_FAST_NATIVE: expected auto, cuda, cpu or none, got {NATIVE!r}")

places = complete_checkout()
native = Extension(
    "dalle2_fast._C",
    sources=[f"csrc/{source}" for source in find_sources(".cpp")],
    optional=NATIVE == "auto",  # a missing tool is then a warning
)

setup(
    package_dir=places,
    packages=find_packages(places),
    package_data={"dalle2_fast": ["py.typed", "pretrained/**", "data/text/clip_merges.*"]},
    include_package_data=False,
    ext_modules=[] if NATIVE == "none" else [native],
    cmdclass={"build_ext": NinjaBuild},
)
