from __future__ import annotations

import subprocess
from pathlib import Path

from nemo_upcycle.reporting.environment import package_commit


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_the_packages_own(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    source = package / "__init__.py"
    source.write_text("")
    assert package_commit(package) is None
    git(tmp_path, "init", "--quiet")
    assert package_commit(package) is None  # the repository does not track the package
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    commit = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert package_commit(package) == commit
    source.write_text("changed = True\n")
    assert package_commit(package) == f"{commit}-dirty"
