"""The images of docker/ and the pages name the containers and releases that `nemo-upcycle doctor` knows."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from nemo_upcycle.cli import doctor


ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def test_table_of_containers_has_those_that_doctor_knows() -> None:
    rows = re.findall(r"^\| (\d\d\.\d\d) \|(.*)\|$", (DOCKER / "README.md").read_text("utf-8"), flags=re.MULTILINE)
    bridges = {release: cells.split("|")[-5].strip() for release, cells in rows}
    known = {release: bridge for bridge, (release, _) in doctor._CONTAINERS.items()}
    assert {release: ".".join(bridge.split(".")[:2]) for release, bridge in bridges.items()} == known


def _laid_over(trainer: str) -> set[str]:
    """Return the package's own pins of what is laid over a container."""
    return {
        one.argument for one in doctor._requirements() if one.name in doctor._LAID_OVER and one.extra in ("", trainer)
    }


@pytest.mark.parametrize("trainer", sorted(doctor._BASES))
def test_an_image_builds_on_doctors_container(trainer: str) -> None:
    text = (DOCKER / f"Dockerfile.{trainer}").read_text(encoding="utf-8")
    assert f"\nARG BASE=nvcr.io/nvidia/nemo:{doctor._BASES[trainer]}\nFROM $BASE\n" in text
    arguments = text.replace("\\\n", " ").split("--ignore-installed --no-deps ")[1].splitlines()[0]
    assert set(shlex.split(arguments)) == _laid_over(trainer)


def test_page_of_installing_lays_over_the_same() -> None:
    page = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    arguments = page.replace("\\\n", " ").split("/shared/me/nemo-upcycle ")[1].splitlines()[0]
    assert set(shlex.split(arguments)) == _laid_over("nemo")


def test_pages_and_code_name_no_other_container() -> None:
    others = (":!tests", ":!CHANGELOG.md")
    command = ["git", "grep", "-hoE", r"(nvcr\.io/nvidia/nemo:|nemo-)[0-9]{2}\.[0-9]{2}", "--", *others]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert names
    assert {name[-5:] for name in names} <= set(doctor._BASES.values())
