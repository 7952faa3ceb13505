"""What the documents say is true: programs run, quotations are verbatim, commands and paths exist.

The kinds of fenced blocks:

    python          executed, a document's blocks in order and in one namespace
    cython, c       written to the file that their first line names
    sh              in docs/layernorm.md executed; elsewhere every `llmc` in it is parsed by the real parser
    text            not a program

`<!-- from PATH -->` above a block: a quotation of that file.  `<!-- needs ISA -->`: run where the CPU has it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from llmc import recipes
from llmc.__main__ import parser
from llmc.training import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
README, TUTORIAL = "README.md", "docs/layernorm.md"
DOCUMENTS = (README, TUTORIAL, "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md")
LANGUAGES = ("python", "cython", "c", "sh", "text")
FENCE = re.compile(
    r"(?:<!-- (?P<key>from|needs) (?P<value>\S+) -->\n)?"
    r"```(?P<language>.*)\n(?P<source>(?:.*\n)*?)```\n"
)
PATH = re.compile(r"(?:llmc|tests|docs|bench|\.ci)/[\w./-]*|[A-Z]\w*\.(?:md|txt)|pyproject\.toml|Makefile")


class Block(NamedTuple):
    """A fenced block: what it holds, the line of its first line, and the comment above it."""

    language: str
    source: str
    line: int
    quoted: str = ""
    needs: str = ""


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str) -> list[Block]:
    text = text_of(document)
    found = []
    for match in FENCE.finditer(text):
        comment = {match["key"]: match["value"]}
        line = text.count("\n", 0, match.start("source")) + 1
        found.append(
            Block(match["language"], match["source"], line, comment.get("from", ""), comment.get("needs", ""))
        )
    assert 2 * len(found) == len(re.findall("^```", text, re.MULTILINE)), f"{document}: a block is not closed"
    return found


def prose(document: str) -> str:
    """A document without its blocks."""
    return FENCE.sub("", text_of(document))


def execute(block: Block, document: str, namespace: dict[str, Any]) -> None:
    """Run Python so that a traceback names the document's own line."""
    code = compile("\n" * (block.line - 1) + block.source, str(ROOT / document), "exec")
    exec(code, namespace)


# ---- programs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_are_of_known_kinds(document: str) -> None:
    assert {block.language for block in blocks(document)} <= set(LANGUAGES)


def test_readme_program(cpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's Python runs, trains, writes something, and saves a model."""
    monkeypatch.chdir(tmp_path)
    programs = [block for block in blocks(README) if block.language == "python"]
    assert programs
    namespace: dict[str, Any] = {"__name__": "readme"}
    for program in programs:
        execute(program, README, namespace)
    assert len(namespace["tokens"]) == 60
    assert (tmp_path / "runs/mine/model.safetensors").exists()


def shims(folder: Path) -> None:
    """`python3` and `cython` as commands of this very interpreter, whatever else is installed."""
    folder.mkdir()
    for name, words in (("python3", ""), ("cython", " -m cython")):
        (folder / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{words} "$@"\n')
        (folder / name).chmod(0o755)


def missing_for(block: Block) -> str:
    """Why a block cannot be run here, or ""."""
    if block.language != "sh":
        return ""
    if shutil.which("cc") is None:
        return "there is no C compiler called cc"
    if "cython" in block.source and find_spec("Cython") is None:
        return "Cython is not installed"
    if "sysconfig" in block.source and not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are not installed"
    return ""


@pytest.mark.heavy
@pytest.mark.skipif(sys.platform != "linux", reason="the tutorial's compiler commands are those for Linux")
def test_tutorial(cpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader who types everything gets to the end."""
    shims(tmp_path / "bin")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.syspath_prepend(str(tmp_path / "work"))
    monkeypatch.delitem(sys.modules, "rows", raising=False)
    environment = {
        **os.environ, "LLMC": str(ROOT), "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    }  # fmt: skip
    namespace: dict[str, Any] = {"__name__": "tutorial"}
    ran = 0
    for block in blocks(TUTORIAL):
        if block.quoted or block.language == "text" or (block.needs and block.needs not in cpu.isas()):
            continue
        if reason := missing_for(block):
            pytest.skip(f"{reason}: {TUTORIAL} ran as far as line {block.line}")
        if block.language == "python":
            execute(block, TUTORIAL, namespace)
        elif block.language == "sh":
            done = subprocess.run(
                ["sh", "-ec", block.source], env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, f"{TUTORIAL}:{block.line}: {done.stderr}"
        else:
            name = re.search(r"\w+\.(?:pyx|c)\b", block.source.splitlines()[0])
            assert name, f"{TUTORIAL}:{block.line}: the first line does not name a file"
            Path(name[0]).write_text(block.source)
        ran += 1
    sys.modules.pop("rows", None)
    assert ran >= 15
    assert set(namespace["libraries"]) == {"scalar", "avx2"} & set(cpu.isas())


QUOTATIONS = [(document, block) for document in DOCUMENTS for block in blocks(document) if block.quoted]


@pytest.mark.parametrize("document, block", QUOTATIONS, ids=[f"{d}:{b.line}" for d, b in QUOTATIONS])
def test_quotations_are_verbatim(document: str, block: Block) -> None:
    source = (ROOT / block.quoted).read_text(encoding="utf-8")
    assert block.source in source, f"{document}:{block.line} is not what {block.quoted} says"


def test_the_tutorial_quotes_the_kernels() -> None:
    assert {block.quoted for _, block in QUOTATIONS} >= {"llmc/_cpu/simd/row.h", "llmc/_cpu/norm.pyx"}


# ---- commands --------------------------------------------------------------------------------------


def shell_lines(block: Block) -> Iterator[list[str]]:
    """The words of each command, continued lines joined, variables in front left out."""
    for line in block.source.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            yield words


def llmc_arguments(words: list[str]) -> list[str] | None:
    """What follows `llmc` on a command line; None where it is another command."""
    for prefix in (["llmc"], ["uv", "run", "llmc"], ["python", "-m", "llmc"], ["python3", "-m", "llmc"]):
        if words[: len(prefix)] == prefix:
            return words[len(prefix) :]
    return None


def commands() -> list[tuple[str, list[str]]]:
    """Every `llmc` command line of the documents, as (document, arguments)."""
    found = []
    for document in DOCUMENTS:
        shell = [block for block in blocks(document) if block.language == "sh"]
        lines = [words for block in shell for words in shell_lines(block)]
        lines += [shlex.split(code) for code in re.findall(r"`(llmc [^`]+)`", prose(document))]
        found += [(document, rest) for words in lines if (rest := llmc_arguments(words)) is not None]
    return found


@pytest.mark.parametrize("document, words", commands(), ids=[" ".join(words) for _, words in commands()])
def test_commands_parse(document: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The real parser takes them; a `train` also makes a valid configuration."""
    top = parser()
    if len(words) == 1 and not words[0].startswith("-"):  # in prose: the command's name alone
        names = next(action.choices for action in top._actions if action.dest == "command")
        assert names is not None and words[0] in names
        return
    try:
        given = vars(top.parse_args(words))
    except SystemExit as stop:
        assert stop.code == 0, f"{document}: {capsys.readouterr().err}"
        return
    if given["command"] == "train":
        types = TrainConfig.types()
        base = recipes.load(given["config"], types) if given["config"] in recipes.names() else {}
        TrainConfig(**{**base, **{name: value for name, value in given.items() if name in types}})


def test_the_readme_shows_every_command() -> None:
    shown = {words[0] for document, words in commands() if document == README}
    assert shown >= {"train", "sample", "data", "convert", "verify", "reference", "info", "bench"}


def test_make_targets_exist() -> None:
    named = {
        words[1]
        for document in DOCUMENTS
        for block in blocks(document)
        if block.language == "sh"
        for words in shell_lines(block)
        if words[0] == "make"
    }
    assert named >= {"train", "test"}
    for target in named:
        assert re.search(rf"^{target}\b.*:", text_of("Makefile"), re.MULTILINE), f"make {target}"


# ---- paths -----------------------------------------------------------------------------------------


def mentioned(document: str) -> set[str]:
    """The paths of the project that a document names: in code, in commands, as links."""
    code = " ".join(re.findall(r"`([^`]+)`", prose(document)))
    shell = " ".join(block.source for block in blocks(document) if block.language == "sh")
    paths = {word.rstrip(".,;:") for word in f"{code} {shell}".split() if PATH.fullmatch(word.rstrip(".,;:"))}
    links = re.findall(r"\]\(([^)]+)\)", prose(document))
    return paths | {link for link in links if not link.startswith(("http", "#"))}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_within_a_document(document: str) -> None:
    """[On a GPU](#on-a-gpu) leads to the heading `On a GPU`."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", prose(document))) - anchors == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_exist(document: str) -> None:
    paths = mentioned(document)
    assert paths
    missing = [path for path in sorted(paths) if not (ROOT / path).exists()]
    if not (ROOT / ".ci").exists():  # a source distribution comes without it
        missing = [path for path in missing if not path.startswith(".ci/")]
    assert missing == [], f"{document} names them"


def tree() -> list[str]:
    """The paths of the README's tree; indentation by two makes a folder's contents."""
    listing = next(block for block in blocks(README) if block.source.startswith("CMakeLists.txt"))
    folders: list[str] = []
    paths = []
    for line in listing.source.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[:depth], line.split()[0]]
        paths.append("".join(folders))
    return paths


def test_the_tree_is_there() -> None:
    missing = [path for path in tree() if not (ROOT / path).exists()]
    assert missing == []


def test_the_tree_leaves_no_module_out() -> None:
    modules = {f"llmc/{path.name}" for path in (ROOT / "llmc").glob("*.py")} - {"llmc/__init__.py"}
    assert modules - set(tree()) == set()
