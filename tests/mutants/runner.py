"""Makes wrong edits of the package, one at a time in a copy of the working tree, and requires that a test fails.

    python -m tests.mutants                          all of mutants.yaml
    python -m tests.mutants --sample 5 --seed 3      a sample, the same for the same seed
    python -m tests.mutants jackknife_of_one_seed    only the named mutants

A test file that passes with every wrong edit protects nothing. Tests marked `weekly` do not run, because a mutant
must make a test of `make test-all` fail. Before any edit, the tests of the chosen mutants must pass in an unchanged
copy. The exit status is 1 if all tests pass with some mutant, or if a mutant cannot be tried.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from nemo_upcycle.utils.progress import duration
from tests.waiting import HANG_S


ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("mutants.yaml")
#: pytest's exit status if all tests pass, and if a test fails.
PASSED, FAILED = 0, 1


@dataclass(frozen=True)
class Mutant:
    """A wrong edit.

    Args:
        name: name of the mutant.
        file: file to change, as a path in the repository.
        old: text to replace, which occurs once in the file.
        new: replacement.
        breaks: sentence that says what goes wrong.
        tests: test files; one of them must fail.
    """

    name: str
    file: str
    old: str
    new: str
    breaks: str
    tests: list[str]

    def applied(self, text: str) -> str:
        """Return the text of the file after the edit.

        Raises:
            ValueError: The text to replace does not occur exactly once.
        """
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"the old text occurs {count} times in {self.file}; expected once")
        return text.replace(self.old, self.new)


def read_mutants() -> dict[str, Mutant]:
    """Return the mutants of the list by name."""
    content = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    return {name: Mutant(name, **fields) for name, fields in content.items()}


@contextmanager
def copied_tree() -> Iterator[Path]:
    """Yield a copy of the working tree without the files that git ignores.

    PYTHONPATH makes Python prefer the copy's package to an installed one. `recipes` and `conf` are links in the copy's
    package, because an installation puts them there.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder).resolve()
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():  # a deleted file is listed until its deletion is committed
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name)
        for name in ("recipes", "conf"):
            (copy / "nemo_upcycle" / name).symlink_to(Path("..", name))
        yield copy


def run_tests(copy: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Run test files of a copy until a test fails; return pytest's status and output.

    Args:
        copy: copy of the working tree.
        tests: test files.

    Raises:
        TimeoutError: The tests hang.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--color=no"]
    command += ["-m", "not weekly", *tests]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        process = subprocess.Popen(
            command,
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy)},
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(HANG_S)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the tests hang: {' '.join(tests)}") from None
        finally:  # also on Ctrl-C, because no process of a test may continue in a folder that is removed
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        printed.seek(0)
        return status, printed.read()


def kill(mutant: Mutant) -> str:
    """Try a mutant; return pytest's line about the test that fails, or "" if all tests pass.

    Raises:
        ValueError: The edit does not fit the file, or pytest cannot run the tests.
        TimeoutError: The tests hang.
    """
    with copied_tree() as copy:
        path = copy / mutant.file
        path.write_text(mutant.applied(path.read_text(encoding="utf-8")), encoding="utf-8")
        status, printed = run_tests(copy, mutant.tests)
    if status == PASSED:
        return ""
    if status != FAILED:
        raise ValueError(f"pytest ended with status {status}; expected a failed test\n{printed[-2000:]}")
    return next((line for line in printed.splitlines() if line.startswith(("FAILED ", "ERROR "))), "FAILED")


def require_passing(mutants: Sequence[Mutant]) -> None:
    """Check that the tests of mutants pass in an unchanged copy, because a test that always fails proves nothing.

    Raises:
        ValueError: A test file fails.
        TimeoutError: The tests hang.
    """
    files = list(dict.fromkeys(file for mutant in mutants for file in mutant.tests))
    with copied_tree() as copy:
        for number, file in enumerate(files, 1):
            status, printed = run_tests(copy, [file])
            if status != PASSED:
                raise ValueError(f"{file} fails without a mutant (status {status})\n{printed[-2000:]}")
            _say(f"unchanged {number}/{len(files)} {file}  passed")


def chosen(arguments: argparse.Namespace) -> list[Mutant]:
    """Return the mutants that a command line names.

    Raises:
        ValueError: A name is not in the list.
    """
    mutants = read_mutants()
    if arguments.sample:
        return random.Random(arguments.seed).sample(list(mutants.values()), arguments.sample)
    if unknown := set(arguments.names) - set(mutants):
        raise ValueError(f"no mutants {', '.join(unknown)} in {LIST.name}")
    return [mutants[name] for name in arguments.names] or list(mutants.values())


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _try_all(mutants: Sequence[Mutant]) -> int:
    """Try mutants one after the other; return the number of mutants that survive or cannot be tried."""
    begun_s, left = time.monotonic(), []
    for number, mutant in enumerate(mutants, 1):
        try:
            killer = kill(mutant)
            outcome = f"killed: {killer}" if killer else f"SURVIVES: {mutant.breaks}"
        except (ValueError, TimeoutError) as error:
            killer, outcome = "", f"ERROR: {error}"
        if not killer:
            left.append(mutant.name)
        eta_s = (time.monotonic() - begun_s) / number * (len(mutants) - number)
        _say(f"{number}/{len(mutants)} {mutant.name}  {outcome}  ETA {duration(eta_s)}")
    _say(f"{len(mutants) - len(left)} of {len(mutants)} mutants killed; left: {', '.join(left) or 'none'}")
    return len(left)


def main(words: Sequence[str] | None = None) -> int:
    """Try the mutants that a command line chooses, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a mutant of mutants.yaml; all without one")
    parser.add_argument("--sample", type=int, metavar="N", help="try N of all, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (0)")
    arguments = parser.parse_args(words)
    for signum in (signal.SIGINT, signal.SIGTERM):  # shells make background jobs (`&`) ignore Ctrl-C
        signal.signal(signum, signal.default_int_handler)
    try:
        mutants = chosen(arguments)
        require_passing(mutants)
        return int(_try_all(mutants) > 0)
    except (ValueError, TimeoutError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
