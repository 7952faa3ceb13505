"""The house has floors, and imports point down only.

    5  __main__, display       words on a command line and on a screen
    4  training, ...           what a user does
    3  gpt2, data, ...         the parts, which do not know one another
    2  arena, ops              memory, and the contract
    1  _cpu, _cuda             kernels
    0  errors

Imports are read from the source, those inside functions and under TYPE_CHECKING too.  A new module makes
this test fail until it is given a floor here.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmc

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "llmc"

FLOORS = {
    "__main__": 5, "display": 5, "results": 5,
    "training": 4, "sampling": 4, "chat": 4, "evaluation": 4, "loading": 4, "verify": 4, "convert": 4, "datasets": 4,
    "torch_reference": 4, "profiling": 4, "benchmark": 4, "cases": 4, "machine": 4,
    "memory": 4, "hfconfig": 4, "peft": 4,
    "gpt2": 3, "llama": 3, "gemma": 3, "lora": 3, "adamw": 3, "schedule": 3, "data": 3, "stories": 3, "tokenizer": 3,
    "checkpoint": 3, "safetensors_folder": 3,
    "hub": 3, "download": 3, "recipes": 3, "costs": 3, "choice": 3, "chat_template": 3, "documents": 3,
    "arena": 2, "ops": 2, "model": 2, "rotary": 2, "files": 2, "tokenizer_config": 2, "_tokenizer": 2,
    "_cpu": 1, "_cuda": 1,
    "errors": 0,
}
BACKENDS = {"_cpu", "_cuda"}
SEPARATE = 3  # the floor whose modules do not import one another
JUDGES = {"torch", "transformers"}  # for tests and comparison alone
NAMELESS = {"utils", "util", "common", "helpers", "helper", "types", "misc", "core"}


def modules() -> dict[str, list[Path]]:
    """The package's modules with their files; a subpackage is one module."""
    found: dict[str, list[Path]] = {}
    for path in sorted([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyx"), *PACKAGE.rglob("*.pxd")]):
        first = path.relative_to(PACKAGE).parts[0]
        if path != PACKAGE / "__init__.py":
            found.setdefault(first.removesuffix(".py"), []).append(path)
    return found


MODULES = modules()


def named(path: Path) -> Iterator[tuple[int, str]]:
    """Lines and dotted names of all that `path` imports, `from a import b` giving a.b."""
    text = path.read_text()
    if path.suffix != ".py":  # Cython: its imports and cimports, which are no Python
        for number, line in enumerate(text.splitlines(), 1):
            if match := re.match(r"\s*from\s+([\w.]+)\s+c?import\s+(.*)", line):
                for name in re.findall(r"\w+", re.sub(r"\s+as\s+\w+", "", match[2])):
                    yield number, f"{match[1]}.{name}"
            elif match := re.match(r"\s*c?import\s+([\w.]+)", line):
                yield number, match[1]
        return
    for node in ast.walk(ast.parse(text, str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parts = path.relative_to(ROOT).with_suffix("").parts
            base = ".".join(parts[: -node.level]) if node.level else ""
            origin = ".".join(part for part in (base, node.module or "") if part)
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}"
        elif isinstance(node, ast.Call):
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            literal = node.args and isinstance(node.args[0], ast.Constant)
            if function in ("import_module", "__import__") and literal:
                yield node.lineno, str(node.args[0].value)  # type: ignore[attr-defined]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Lines and names of the llmc modules that `path` imports."""
    for line, name in named(path):
        parts = name.split(".")
        if parts[0] != "llmc" or len(parts) < 2:
            continue
        module = parts[1]
        if module not in MODULES:  # a public name, which llmc loads from its home
            module = llmc._HOMES.get(module, module)
        if module in MODULES:
            yield line, module


def edges() -> list[tuple[str, str, str]]:
    """(importer, imported, place) for all of the package."""
    return [
        (module, target, f"{path.relative_to(ROOT)}:{line}")
        for module, paths in MODULES.items()
        for path in paths
        for line, target in imported(path)
        if target != module
    ]


def test_every_module_has_a_floor() -> None:
    assert sorted(set(MODULES) - set(FLOORS)) == [], "give the new module a floor in this test"


def test_imports_point_down() -> None:
    upward = [
        f"{place}: {module} (floor {FLOORS[module]}) imports {target} (floor {FLOORS[target]})"
        for module, target, place in edges()
        if FLOORS.get(target, 9) > FLOORS.get(module, 9)
    ]
    assert upward == []


def test_the_parts_do_not_know_one_another() -> None:
    across = [
        f"{place}: {module} imports {target}"
        for module, target, place in edges()
        if FLOORS.get(module) == FLOORS.get(target) == SEPARATE
    ]
    assert across == []


def test_backends_are_reached_through_ops_alone() -> None:
    direct = [
        f"{place}: {module} imports {target}"
        for module, target, place in edges()
        if target in BACKENDS and module != "ops"
    ]
    assert direct == []


def test_no_circles() -> None:
    below: dict[str, set[str]] = {module: set() for module in MODULES}
    for module, target, _ in edges():
        below[module].add(target)
    while free := [module for module in below if not below[module] & below.keys()]:
        for module in free:
            del below[module]
    assert below == {}, "these modules import one another in a circle"


def test_pytorch_is_only_the_judge() -> None:
    outside = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for module, paths in MODULES.items()
        for path in paths
        for line, name in named(path)
        if name.split(".")[0] in JUDGES and module != "torch_reference"
    ]
    assert outside == []


def test_the_reading_of_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above rest on: every way to write an import is seen."""
    package = tmp_path / "llmc"
    package.mkdir()
    source = package / "probe.py"
    source.write_text(
        "import llmc.gpt2\nimport numpy, llmc.data as d\nfrom llmc import arena, train\n"
        "from . import schedule\nfrom .hub import x\nfrom llmc.adamw import AdamW\n"
        "def f():\n    from llmc import verify\n"
        "    import importlib; importlib.import_module('llmc.stories')\n    __import__('llmc._cpu')\n"
        "if TYPE_CHECKING:\n    from llmc.convert import y\n"
    )
    cython = package / "probe.pyx"
    cython.write_text("from llmc._cpu cimport check, isa\n  from llmc.errors import E\nimport llmc.ops\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "MODULES", {name: [] for name in FLOORS})
    assert {name for _, name in imported(source)} == {
        "gpt2", "data", "arena", "training", "schedule", "hub", "adamw", "verify", "stories", "_cpu",
        "convert",
    }
    assert {name for _, name in imported(cython)} == {"_cpu", "errors", "ops"}


# ---- names -----------------------------------------------------------------------------------------


def test_no_module_has_the_name_of_a_public_function() -> None:
    """`llmc.train` is a function; a module llmc/train.py would take its place once imported."""
    assert set(llmc.__all__) & set(MODULES) == set()


def test_modules_are_named_for_what_they_are_about() -> None:
    folders = [ROOT / name for name in ("llmc", "tests", "bench", "docs")]
    nameless = [
        str(path.relative_to(ROOT))
        for folder in folders
        for path in folder.rglob("*")
        if path.stem in NAMELESS and (path.is_dir() or path.suffix in (".py", ".pyx", ".c", ".h"))
    ]
    assert nameless == []


# ---- what costs time is loaded late ----------------------------------------------------------------

HEAVY = (
    "numpy", "rich", "tiktoken", "safetensors", "ml_dtypes", "huggingface_hub", "torch", "pycuda", "llmc._cpu",
    "llmc._cuda", "tokenizers", "sentencepiece", "jinja2", "pyarrow", "datasets",
)  # fmt: skip
LOADED = f"import sys; print('LOADED', *(name for name in {HEAVY!r} if name in sys.modules))"


def loaded(program: str) -> list[str]:
    """The expensive modules that a fresh interpreter has loaded after `program`."""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("LOADED"))
    return line.split()[1:]


def test_import_is_free() -> None:
    assert loaded(f"import llmc; llmc.__version__; dir(llmc)\n{LOADED}") == []


@pytest.mark.parametrize("command", ["", "train", "sample", "data", "bench", "bench kernels"])
def test_help_is_free(command: str) -> None:
    words = [*command.split(), "--help"]
    program = (
        "import atexit, runpy, sys\n"
        f"sys.argv = ['llmc', *{words!r}]\n"
        f"atexit.register(lambda: exec({LOADED!r}))\n"
        "runpy.run_module('llmc', run_name='__main__')\n"
    )
    assert loaded(program) == []


def test_the_models_load_no_judge() -> None:
    """Training imports what it needs, and torch is not among it."""
    program = f"import llmc; llmc.train, llmc.load, llmc.generate\n{LOADED}"
    assert "torch" not in loaded(program)


def test_public_names_exist() -> None:
    for name in llmc.__all__:
        assert getattr(llmc, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        llmc.no_such_name  # noqa: B018
