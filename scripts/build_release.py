"""Build the wheel and the source distribution from git's tracked files: `python scripts/build_release.py FOLDER`."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
_BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]  # setuptools changes it
build_meta.build_wheel(folder)
build_meta.build_sdist(folder)
"""


def build_release(folder: Path) -> None:
    """Build wheel and source distribution with the setuptools of this interpreter, without any download.

    Args:
        folder: output folder; it is created if missing, and files of earlier builds in it are deleted.

    Raises:
        RuntimeError: the build fails.
    """
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.whl"), *folder.glob("*.tar.gz")):
        old.unlink()
    with tempfile.TemporaryDirectory() as tree:
        for name in filter(lambda name: (ROOT / name).is_file(), names.split("\0")):
            path = Path(tree, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, path)
        words = [sys.executable, "-c", _BUILD, str(folder)]
        done = subprocess.run(words, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])


if __name__ == "__main__":
    build_release(Path(sys.argv[1]))
    for built in sorted(Path(sys.argv[1]).iterdir()):
        sys.stdout.write(f"{built}\n")
