"""The repository's promises about itself: commands exist, YAML loads, files are in order."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from benchmarks import doc_tables
from nemo_upcycle.recipes import nemo_functions


ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def _tracked(*patterns: str) -> list[Path]:
    names = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.splitlines()]


PAGES = _tracked("README.md", "docs/*.md")


def _blocks(page: Path, language: str) -> list[str]:
    """Return a page's code blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def _commands() -> list[str]:
    """Return the commands of README and docs, except how-tos, whose commands name things that the how-to creates."""
    pages = [page for page in PAGES if not page.name.startswith("add_")]
    blocks = [block.replace("\\\n", " ") for page in pages for block in _blocks(page, "bash")]
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("path", _tracked("conf/*.yaml", "conf/**/*.yaml"), ids=lambda path: path.name)
def test_every_yaml_loads_and_every_key_is_explained(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    assert text.startswith("#"), "a header comment says what the file is for"
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\w+:", line) and "are explained in" not in text:
            around = [lines[number - 1], *lines[number + 1 : number + 2]]  # a group is explained in its first line
            assert any(other.lstrip().startswith("#") for other in around), f"{path.name}: {line}"


def test_nemo_commands_of_the_pages_name_registered_recipes() -> None:
    factory = re.compile(r"--factory \"?([a-z0-9_]+)(?![a-z0-9_.])")  # names with a dot belong to users
    named = {match for command in _commands() if "nemo" in command for match in factory.findall(command)}
    assert {"smollm2_135m_e8t2", "llama3_8b_e8t2"} <= named
    assert named <= {*nemo_functions()}


def test_python_of_the_pages_compiles() -> None:
    pages = {page.name: _blocks(page, "python") for page in PAGES}
    assert pages["README.md"]
    for name, blocks in pages.items():
        for block in blocks:
            compile(block, name, "exec")


def test_readme_is_short_and_index_has_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 80
    assert len(text.split()) <= 600
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]
    docs = ROOT / "docs"
    pages = {str(page.relative_to(docs).with_suffix("")) for page in _tracked("docs/*.md")} - {"index"}
    assert pages <= set((docs / "index.md").read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_python_of_the_pages_runs_without_a_card(page: Path) -> None:
    """Without a GPU, Megatron-Core 0.15 can be imported only after this package.

    Bridge's Megatron-Core is newer, and the recipes of add_recipe.md lie inside the package.
    """
    for block in _blocks(page, "python"):
        lines = re.findall(r"^(?:from|import) (nemo_upcycle|nemo\.|megatron\.core)", block, flags=re.MULTILINE)
        if "nemo_upcycle" in lines and page.name != "add_recipe.md":
            assert lines[0] == "nemo_upcycle", block


def test_the_pages_are_short_and_say_first_who_needs_them() -> None:
    pages = [page for page in doc_tables.pages() if page.name != "index.md"]
    first = {page: page.read_text(encoding="utf-8").split("\n\n")[1] for page in pages}
    assert [page.name for page in pages if not re.match(r"\*\*(Guide|Reference)\*\* for whoever ", first[page])] == []
    assert [page.name for page in pages if first[page].startswith("**Guide") and doc_tables.words(page) > 1500] == []
    assert sum(map(doc_tables.words, pages)) <= 18_000, "python -m benchmarks.doc_tables --words"


def test_tables_of_the_pages_are_those_of_the_code() -> None:
    made = [page for page in doc_tables.pages() if doc_tables.TABLE.search(page.read_text(encoding="utf-8"))]
    assert len(made) >= 6
    for page in made:
        text = page.read_text(encoding="utf-8")
        assert doc_tables.with_tables(text) == text, "run python -m benchmarks.doc_tables"


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and the documentation build them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", _tracked("*.md"), ids=lambda path: path.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")):
        other = page.parent / target if target else page
        assert other.exists(), target
        assert not anchor or other.suffix != ".md" or anchor in _anchors(other), f"{target}#{anchor}"


def test_the_table_of_bridge_names_existing_tests() -> None:
    page = (ROOT / "docs/bridge_reference.md").read_text(encoding="utf-8")
    table = page[page.index("| | NeMo 2.7 |") :].partition("\n\n")[0].splitlines()
    assert len(table) > 15
    for row in table[2:]:
        named = re.findall(r"`([\w/]+)`", row.split("|")[-2])
        assert named, row
        for name in named:
            assert (ROOT / f"{name if '/' in name else f'tests/bridge/{name}'}.py").is_file(), name


def test_every_package_is_installed() -> None:
    folders = {path.parent.relative_to(ROOT) for path in _tracked("nemo_upcycle/**/__init__.py")}
    missing = {name for folder in folders if f'"{(name := str(folder).replace("/", "."))}"' not in PYPROJECT}
    assert not missing


def test_the_lock_is_of_these_dependencies() -> None:
    """Do the check of `uv lock --check` without uv."""
    tomllib = pytest.importorskip("tomllib", reason="of Python 3.11")
    stated = tomllib.loads(PYPROJECT)
    packages = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]
    locked = next(package["metadata"] for package in packages if package["name"] == "nemo-upcycle")

    needs = {f"extra == '{extra}'": lines for extra, lines in stated["project"]["optional-dependencies"].items()}
    needs[""] = stated["project"]["dependencies"]
    wanted = {(marker, *_stated(line)) for marker, lines in needs.items() for line in lines}
    assert {(one.get("marker", ""), *_locked(one)) for one in locked["requires-dist"]} == wanted, "run scripts/lock.sh"
    groups = stated["dependency-groups"]
    wanted = {(group, *_stated(line)) for group in groups for line in _lines_of(group, groups)}
    found = {(group, *_locked(one)) for group, entries in locked["requires-dev"].items() for one in entries}
    assert found == wanted, "run scripts/lock.sh"


@pytest.mark.parametrize("name", ["nemo", "data", "tf5"])
def test_constraints_are_made_of_the_lock(name: str) -> None:
    tomllib = pytest.importorskip("tomllib", reason="of Python 3.11")
    lock = (ROOT / "uv.lock").read_bytes()
    first, *lines = (ROOT / f"scripts/constraints/{name}.txt").read_text(encoding="utf-8").splitlines()
    assert first.endswith(hashlib.sha256(lock).hexdigest()), "run scripts/lock.sh"
    locked = {f"{one['name']}=={one.get('version')}" for one in tomllib.loads(lock.decode())["package"]}
    assert {line.partition(" ")[0] for line in lines} <= locked


def test_bridges_constraints_fit_what_is_asked_for() -> None:
    pinned = dict(
        line.split("==") for line in (ROOT / "scripts/constraints/bridge.txt").read_text("utf-8").splitlines()
    )
    lines = (ROOT / "scripts/bridge.txt").read_text("utf-8").splitlines()
    asked = [Requirement(line) for line in lines if not line.startswith("#")]
    misfits = [need for need in asked if pinned.get(need.name) not in need.specifier]
    assert not misfits, "run scripts/lock.sh"


def _locked(entry: dict[str, Any]) -> tuple[str, SpecifierSet]:
    return entry["name"], SpecifierSet(entry.get("specifier", ""))


def _stated(line: str) -> tuple[str, SpecifierSet]:
    need = Requirement(line)
    return need.name, need.specifier


def _lines_of(group: str, groups: dict[str, list[Any]]) -> list[str]:
    lines = []
    for entry in groups[group]:
        lines += [entry] if isinstance(entry, str) else _lines_of(entry["include-group"], groups)
    return lines


def test_the_lock_names_the_public_index_alone() -> None:
    text = (ROOT / "uv.lock").read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^/\"]+", text)) == {"https://pypi.org", "https://files.pythonhosted.org"}


def test_files_can_be_read_in_one_sitting() -> None:
    long = {p.name: n for p in _tracked("*.py") if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long


def test_modules_import_without_cuda_and_without_nemo() -> None:
    """The library layers start fast: importing them loads neither Megatron nor NeMo nor transformers."""
    modules = "models.mapping init.router sources online.upcycle convert.export online.receipt"
    code = (
        "import sys, importlib\n"
        f"for name in '{modules}'.split(): importlib.import_module(f'nemo_upcycle.{{name}}')\n"
        "heavy = {'megatron', 'nemo', 'nemo_run', 'lightning', 'transformers', 'lm_eval'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_test_asserts_how_long_something_takes() -> None:
    """Tests must pass on a slow or busy machine. Each limit against hanging is set in one place."""
    limits = {"waiting.py", "ranks.py", "kubernetes_server.py", "soak.py", "runner.py"}
    clocks = re.compile(r"time\.(monotonic|perf_counter|process_time)\(|os\.times\(|getrusage|timeout=\d{2}")
    paths = [path for path in _tracked("tests/*.py", "tests/**/*.py") if path.name not in limits]
    assert [path.name for path in paths if path != Path(__file__) and clocks.search(path.read_text("utf-8"))] == []
