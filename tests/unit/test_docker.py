"""The images of docker/ and the pages name the same containers and releases."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

from nemo_upcycle.cli import doctor


ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def _laid_over() -> set[str]:
    """Return this package's pins of the packages that are installed on top of the NeMo container."""
    return {one.argument for one in doctor._requirements() if one.name in doctor._LAID_OVER and one.extra == "nemo"}


def test_image_lays_over_the_packages_own_pins() -> None:
    text = (DOCKER / "Dockerfile.nemo").read_text(encoding="utf-8")
    arguments = text.replace("\\\n", " ").split("--ignore-installed --no-deps ")[1].splitlines()[0]
    assert set(shlex.split(arguments)) == _laid_over()


def test_page_of_installing_lays_over_the_same() -> None:
    page = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    arguments = page.replace("\\\n", " ").split("/shared/me/nemo-upcycle ")[1].splitlines()[0]
    assert set(shlex.split(arguments)) == _laid_over()


def test_pages_and_code_name_no_other_container() -> None:
    others = (":!tests", ":!CHANGELOG.md")
    command = ["git", "grep", "-hoE", r"(nvcr\.io/nvidia/nemo:|nemo-)[0-9]{2}\.[0-9]{2}", "--", *others]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    bases = set()
    for trainer in ("nemo", "bridge"):
        text = (DOCKER / f"Dockerfile.{trainer}").read_text("utf-8")
        bases |= set(re.findall(r"BASE=nvcr.io/nvidia/nemo:(\S+)", text))
    assert len(bases) == 3
    assert {name[-5:] for name in names} == bases
