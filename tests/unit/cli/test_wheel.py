"""What a user has who has no clone: a wheel, in an environment with nothing else, and the source distribution."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest

from nemo_upcycle.cli.main import COMMANDS


ROOT = Path(__file__).parents[3]


def _run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution, built from the files that git tracks."""
    folder = tmp_path_factory.mktemp("dist")
    done = _run(sys.executable, ROOT / "scripts/build_release.py", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of an environment with the wheel and the standard library."""
    environment = tmp_path_factory.mktemp("bare") / "venv"
    assert _run(sys.executable, "-m", "venv", "--without-pip", environment).returncode == 0
    install = ("--python", environment, "install", "--quiet", "--no-deps", "--no-index", wheel)
    done = _run(sys.executable, "-m", "pip", *install)
    assert done.returncode == 0, done.stderr
    return environment / "bin/nemo-upcycle"


@pytest.mark.full
def test_doctor_runs_on_the_standard_library_alone(bare: Path) -> None:
    done = _run(bare, "doctor")
    assert (done.returncode, done.stderr) == (1, "")
    assert re.search(rf"{bare.parent}/python\S* -m pip install 'torch<3,>=2\.6'", done.stdout)
    found = json.loads(_run(bare, "doctor", "--json").stdout)
    missing = {one["name"] for one in found["libraries"] if not one["extra"]}
    assert {"torch", "safetensors", "omegaconf", "rich"} <= missing
    assert found["fits"] is False
    assert not [fix for fix in found["fixes"] if "doctor" in fix]


@pytest.mark.full
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_from_a_wheel(bare: Path, name: str) -> None:
    done = _run(bare, name, "--help")
    if done.returncode:  # some import what they need for their own options
        assert re.fullmatch(r"error: \w+ is not installed\. Fix: run `nemo-upcycle doctor`, .*\n", done.stderr)


@pytest.mark.full
def test_the_wheel_holds_files_that_are_no_python_and_no_address_that_is_not_there(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    assert {"nemo_upcycle/reporting/report.css", "nemo_upcycle/conf/data/text.yaml"} <= {*names}
    assert "\nAuthor: nemo-upcycle contributors\n" in metadata
    assert "\nProject-URL:" not in metadata


@pytest.mark.full
def test_every_relative_link_of_the_source_distribution_leads_somewhere(built: Path, tmp_path: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    tree = next(tmp_path.iterdir())
    assert {"conf/data/text.yaml", "recipes/table.py", "tests/unit/cli/test_wheel.py"} <= names
    pages = [tree / name for name in names if name.endswith(".md")]
    links = [(page, re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))) for page in pages]
    assert sum(len(targets) for _, targets in links) > 50
    assert not [(page, to) for page, targets in links for to in targets if not (page.parent / to).exists()]


def test_no_message_names_a_page_that_only_a_clone_has() -> None:
    """Docstrings may: they are read beside the source."""
    for path in (ROOT / "nemo_upcycle").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
        }
        texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        named = [
            one.value for one in texts if id(one) not in docstrings and re.search(r"\bdocs/|see conf/", one.value)
        ]
        assert not named, path
