"""Who may import whom, and what importing the package may not do.

The arrows are read from the source with `ast`, imports inside functions included: no arrow hides in a lazy
import.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "dalle2_fast"

# room -> the rooms it may import. A room is a file or folder directly in dalle2_fast/.
ARROWS = {
    "_lazy": set(),
    "seeds": set(),
    "draws": set(),
    "memory": set(),
    "cuda_graphs": set(),
    "_C": set(),
    "kernels": {"_C"},
    "ops": {"kernels", "_C"},
    "reference": {"ops"},
    "functional": {"ops"},
    "modules": {"functional", "ops"},
    "losses": {"functional", "ops"},
    "diffusion": {"functional", "seeds", "draws", "ops", "_lazy"},
    "data": {"seeds", "ops", "_lazy"},
    "checkpoints": {"ops", "data", "_lazy"},
    "models": {"seeds", "draws", "modules", "functional", "ops", "diffusion", "data", "checkpoints", "_lazy"},
    "pipeline": {"seeds", "models", "diffusion", "ops", "data", "checkpoints", "cuda_graphs", "_lazy"},
    "evaluation": {"seeds", "pipeline", "models", "diffusion", "data", "checkpoints"},
    "embeddings": {"models", "data", "checkpoints"},
    "training": {"embeddings", "evaluation", "pipeline", "models", "losses", "diffusion", "data",
                 "checkpoints", "functional", "seeds", "draws", "cuda_graphs"},  # fmt: skip
    "adapters": {"losses", "models", "modules", "functional", "ops", "diffusion", "data", "checkpoints",
                 "seeds", "_lazy"},  # fmt: skip
    "serving": {"pipeline", "data", "seeds"},
    "demo": {"pipeline", "evaluation", "models", "data"},
    "cli": {"serving", "demo", "training", "embeddings", "evaluation", "pipeline", "models", "data",
            "checkpoints", "ops", "memory", "seeds", "__init__"},  # fmt: skip
    "__main__": {"cli"},
    "previous_paths": {"pipeline", "models", "data", "adapters"},
    "__init__": {"pipeline", "models", "modules", "losses", "functional", "diffusion", "data", "checkpoints",
                 "ops", "adapters", "memory", "_lazy"},  # fmt: skip
}
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def module_name(path: Path) -> tuple[str, ...]:
    """("dalle2_fast", "models", "unet"); a package's __init__ has the package's name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("dalle2_fast", *parts) if parts[0] == "kernels" else parts
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts


def room(module: tuple[str, ...]) -> str:
    return module[1] if len(module) > 1 else "__init__"


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names of everything imported; `from a import b` gives a.b, as b may be a module."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path)[:-1]
    if path == PACKAGE / "__init__.py":
        package = ("dalle2_fast",)
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path):
    here = room(module_name(path))
    assert here in ARROWS, f"a new room: say in ARROWS what {here} may import"
    for name in imports(path):
        top, *rest = name.split(".")
        assert top not in ("tests", "benchmarks", "kernels"), f"{path} imports {name}"
        if top != "dalle2_fast":
            continue
        there = room((top, *rest))
        if there not in ARROWS:  # `from dalle2_fast import DALLE2`: a public name, not a room
            there = "__init__"
        assert there == here or there in ARROWS[here], f"{path} ({here}) imports {name} ({there})"


def test_arrows_have_no_circle():
    list(TopologicalSorter(ARROWS).static_order())


def outside(path: Path) -> set[str]:
    """Top-level names of the third-party packages that a file imports."""
    tops = {name.split(".")[0] for name in imports(path)}
    return tops - set(sys.stdlib_module_names) - {"dalle2_fast", "__future__"}


def bindings(tree: ast.Module) -> dict[str, ast.stmt]:
    """name -> the top-level statement of a module that binds it."""
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name.split(".")[0]: node for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            names = (name for target in node.targets for name in ast.walk(target))
            found |= {name.id: node for name in names if isinstance(name, ast.Name)}
    return found


def dependencies(module: str, name: str, seen: set[tuple[str, str]]) -> Iterator[str]:
    """What the code of `name` uses, directly or through our own functions and constants.

    Yields dotted names of other packages, and those of ours that are a whole module or were not found. The
    annotations of arguments do not count, because they are not run.
    """
    if (module, name) in seen:
        return
    seen.add((module, name))
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    bound = bindings(ast.parse(path.read_text())) if path.exists() else {}
    node = bound.get(name)
    if node is None:
        yield f"{module}.{name}"
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        given = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
        if node.module.split(".")[0] == "dalle2_fast":
            yield from dependencies(node.module, given, seen)
        else:
            yield f"{node.module}.{given}"
    else:
        code = node.body if isinstance(node, ast.FunctionDef) else [node]
        for part in (inner for statement in code for inner in ast.walk(statement)):
            if isinstance(part, ast.Attribute):
                dotted = ast.unparse(part)
                if dotted.startswith(("torch.ops", "torch.library")):
                    yield dotted
            elif isinstance(part, ast.Import):  # inside a function
                yield from (alias.name for alias in part.names)
            elif isinstance(part, ast.ImportFrom):
                yield from (f"{part.module}.{alias.name}" for alias in part.names)
            elif isinstance(part, ast.Name) and part.id in bound and part.id != name:
                yield from dependencies(module, part.id, seen)


def test_the_references_need_only_torch():
    """A reference that calls a kernel, dispatch or the native module is no specification."""
    tree = ast.parse((PACKAGE / "reference.py").read_text())
    exported = [name for name, node in bindings(tree).items() if isinstance(node, ast.ImportFrom)]
    exported.remove("annotations")
    assert {"group_norm_silu", "cross_attention", "diffusion_step", "add_noise"} <= set(exported)
    seen: set[tuple[str, str]] = set()
    needed = {name for export in exported for name in dependencies("dalle2_fast.reference", export, seen)}
    for name in needed:
        assert name.split(".")[0] in ("torch", *sys.stdlib_module_names), f"a reference uses {name}"
        assert not name.startswith(("torch.ops", "torch.library")), f"a reference uses {name}"
    assert "torch.nn.functional" in needed
    assert ("dalle2_fast.ops.noise", "philox_4x32_10") in seen  # what a reference calls was followed


def test_kernels_and_dispatch_are_found_as_dependencies():
    """The test of the references must see what it looks for; public functions and dispatch have it all."""
    public = set(dependencies("dalle2_fast.ops.diffusion_step", "diffusion_step", set()))
    assert {"dalle2_fast.ops._dispatch", "torch.ops.dalle2_fast.diffusion_step"} <= public
    loader = set(dependencies("dalle2_fast.ops._dispatch", "load_native", set()))
    assert "dalle2_fast._C" in loader


def test_ops_need_only_torch():
    for path in (PACKAGE / "ops").glob("*.py"):
        assert outside(path) <= {"torch"}, path
    assert outside(PACKAGE / "reference.py") == set()


def test_only_kernels_import_triton_and_only_op_registers():
    for path in SOURCES:
        in_kernels = room(module_name(path)) == "kernels"
        assert in_kernels or "triton" not in outside(path), path
        if path.name != "_op.py":
            used = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text()))
                    if isinstance(node, ast.Attribute)}
            assert "torch.library" not in used, path
            assert not any(name.startswith("torch.library") for name in imports(path)), path


IMPORT = """
import sys, torch
before = set(sys.modules)
import dalle2_fast
print(*sorted(set(sys.modules) - before), sep="\\n", file=sys.stderr)
"""


def test_import_is_silent_and_light(tmp_path):
    """Catches: an import that prints or warns, and one that loads what makes a start slow."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", IMPORT], cwd=tmp_path, text=True,
                          capture_output=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    new = done.stderr.split()
    assert len(new) < 10
    heavy = {"triton", "torch._dynamo", "torch._inductor", "webdataset", "gradio", "torchvision"}
    assert heavy.isdisjoint(new), heavy & set(new)
