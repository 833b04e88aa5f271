"""Installation without a clone: only the wheel in an empty environment, and the source distribution."""

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
    """Path of `nemo-upcycle` in an environment with only the wheel and the standard library."""
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
    assert {"torch", "omegaconf"} <= {one["name"] for one in found["libraries"] if not one["extra"]}
    assert not [fix for fix in found["fixes"] if "doctor" in fix]


@pytest.mark.full
def test_the_archives_hold_data_files_and_no_dead_link(built: Path, wheel: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as source:
        names = [name.partition("/")[2] for name in source.getnames()]
    assert {"conf/data/text.yaml", "recipes/llama3_8b.py", "tests/unit/cli/test_wheel.py"} <= {*names}
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    assert {"nemo_upcycle/reporting/report.css", "nemo_upcycle/conf/data/text.yaml"} <= {*names}
    assert "\nAuthor: nemo-upcycle contributors\n" in metadata
    assert "\nProject-URL:" not in metadata


def test_no_message_names_a_page_that_only_a_clone_has() -> None:
    """A docstring may name a page in docs/, because whoever reads the docstring also has the source."""
    for path in (ROOT / "nemo_upcycle").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in alone]
        assert not [one.value for one in texts if re.search(r"\bdocs/|see conf/", str(one.value))], path
