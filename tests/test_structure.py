"""The floors of the package: what may import what, and what `import qlinear` may cost."""

import ast
import sys
from pathlib import Path

import pytest
from models import ROOT, run_python

PACKAGE, KERNELS = ROOT / "qlinear", ROOT / "kernels"

#: Floors from the ground up. A module imports only from floors below its own (kernels among themselves: see below).
FLOORS = [
    ["float_layers", "folders", "format", "patterns"],
    ["bits", "grid", "masks", "prepacked"],
    ["quantize"],
    ["sparse", "cpu_layout"],
    ["layout"],
    ["sparse_layout", "layout24"],
    ["packing"],
    ["cpu_blocks"],
    ["cpu_sparse"],
    ["reference", "cpu", "kernels"],
    ["paths", "semi_structured", "token_ops"],
    ["ops"],
    ["linear"],
    ["undo", "reshaped", "selection"],
    ["conversion", "compressed"],
    ["inspection", "validation", "checkpoint", "tuning"],
    ["pruning"],
    ["__init__"],
    ["doctor"],
    ["demo"],
    ["cli"],
    ["__main__"],
]
#: May be imported by any floor, imports none of ours.
SHARED = {"cache", "machines", "tables"}
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}

SOURCES = sorted(
    [*PACKAGE.glob("*.py"), *PACKAGE.glob("demo/**/*.py"), *PACKAGE.glob("pruning/**/*.py"), *KERNELS.glob("*.py")]
)
BENCH = sorted((ROOT / "bench").glob("**/*.py"))
TESTS = sorted((ROOT / "tests").glob("*.py"))


def relative(path):
    return str(path.relative_to(ROOT))


def part(path):
    """The name of the floor a source file stands on."""
    if KERNELS in path.parents:
        return "kernels"
    below = path.relative_to(PACKAGE).parts
    return below[0].removesuffix(".py")


def imports(path, top=False):
    """Dotted names of the modules a file imports, wherever the import stands (``top``: at the top of the file only)."""
    found, tree = set(), ast.parse(path.read_text())
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: imports are absolute here"
            # `from qlinear import x`: x may be a module or something the package itself exports.
            whole = node.module == "qlinear"
            found |= {f"qlinear.{alias.name}" for alias in node.names} if whole else {node.module}
    return found


def ours(path):
    """Parts of qlinear that a file imports; ``__init__`` for the names the package itself exports."""
    found = set()
    for name in imports(path):
        first, *rest = name.split(".")
        if first != "qlinear":
            continue
        if rest:
            found.add(rest[0] if rest[0] in LEVEL or rest[0] in SHARED else "__init__")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_go_down_only(path):
    name = part(path)
    assert name in LEVEL or name in SHARED, f"{name} has no floor yet: give it one in FLOORS"
    level = LEVEL.get(name, -1)
    for imported in ours(path) - SHARED:
        same_folder = imported == name in ("kernels", "demo", "pruning")
        assert same_folder or LEVEL[imported] < level, (
            f"{relative(path)} imports qlinear.{imported}, which is not below it"
        )


def test_the_kernels_need_no_more_than_the_formats_and_packing():
    for path in KERNELS.glob("*.py"):
        assert ours(path) <= {"format", "bits", "layout", "layout24", "packing", "kernels"} | SHARED, relative(path)


def test_no_import_runs_in_a_circle():
    prefix = "qlinear.kernels."
    graph = {
        p.stem: {n.split(".")[2] for n in imports(p, top=True) if n.startswith(prefix)} for p in KERNELS.glob("*.py")
    }
    done: set[str] = set()
    while remaining := {name for name in graph if name not in done}:
        ready = {name for name in remaining if graph[name] & set(graph) <= done}
        assert ready, f"a circle among {sorted(remaining)}"
        done |= ready


def test_kernels_is_no_package_of_its_own():
    """transformers imports a package called ``kernels``: ours must never be found under that name."""
    assert not (KERNELS / "__init__.py").exists()
    link = PACKAGE / "kernels"
    assert link.is_symlink() and link.resolve() == KERNELS and link.readlink() == Path("../kernels")
    for path in [*SOURCES, *BENCH, *TESTS]:
        assert not {n for n in imports(path) if n.split(".")[0] == "kernels"}, relative(path)


def test_triton_stays_in_the_kernels():
    for path in SOURCES:
        if PACKAGE in path.parents:
            assert not {n for n in imports(path) if n.split(".")[0] == "triton"}, relative(path)


def test_kernels_are_imported_where_a_gpu_needs_them_and_not_before():
    """No import of qlinear.kernels at the top of a module that `import qlinear` loads."""
    for path in PACKAGE.glob("*.py"):
        assert not [n for n in imports(path, top=True) if n.startswith(("qlinear.kernels", "triton", "transformers"))]


@pytest.mark.parametrize("path", [*SOURCES, *BENCH], ids=relative)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) < 300


def test_what_the_package_promises_exists():
    import qlinear

    assert sorted(qlinear.__all__) == sorted(set(qlinear.__all__))
    assert all(hasattr(qlinear, name) for name in qlinear.__all__)
    assert (PACKAGE / "py.typed").exists()


def test_import_works_without_triton():
    code = """
    import sys

    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("triton", "transformers", "accelerate"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Absent())
    import torch, qlinear
    model = qlinear.convert(torch.nn.Sequential(torch.nn.Linear(40, 8)), "w4a16-g32")
    assert model(torch.randn(3, 40)).shape == (3, 8)
    assert not [m for m in sys.modules if m.split(".")[0] in ("triton", "transformers")]
    print("done")
    """
    assert run_python(code).strip() == "done"


def test_import_loads_nothing_it_does_not_need():
    """Nothing is queried, tuned or allocated at import; what torch loads itself is torch's affair."""
    code = """
    import sys, torch, tqdm, numpy, safetensors
    before = set(sys.modules)
    threads = torch.get_num_threads()
    import qlinear
    new = {m.split(".")[0] for m in set(sys.modules) - before}
    assert not new & {"triton", "transformers", "accelerate", "gguf", "click", "kernels"}, new
    assert not [m for m in sys.modules if m.startswith("qlinear.kernels")]
    assert not torch.cuda.is_initialized() and torch.get_num_threads() == threads
    print("done")
    """
    assert run_python(code).strip() == "done"


def test_the_supported_python_can_parse_every_file():
    for path in [*SOURCES, *BENCH, *TESTS]:
        ast.parse(path.read_text(), feature_version=(3, 10))
    assert sys.version_info >= (3, 10)
