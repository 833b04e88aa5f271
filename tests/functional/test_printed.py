"""Commands that a run prints also work in another folder, for runs of a recipe, of `start` and of a user's module."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.distributed.ranks import run_ranks
from tests.functional.started import NEMO, ROOT
from tests.functional.tiny import BATCH, SEQUENCE, SIZES
from tests.functional.typed import Answer, type_commands
from tests.started import PACKED, unpack


pytestmark = [pytest.mark.slow, pytest.mark.full]
#: Folder of the user's module, inside the folder where commands are typed.
MODULES = "my modules"
_INPUTS = ("data=texts/blend.yaml", "evaluation=evaluation.yaml", "dir=runs/a")
_TRAINING = {"trainer.max_steps": 4, "data.global_batch_size": BATCH, "data.seq_length": SEQUENCE}
_MODEL = SIZES | {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 24}


def _of_both(settings: Mapping[str, object]) -> list[str]:
    return [f"{stage}.{name}={value}" for stage in ("pretrain", "dense_ct") for name, value in settings.items()]


#: Kind of run -> words after `nemo upcycle pipeline` or `nemo-upcycle start`.
TYPED = {
    "recipe": [
        *("--factory", "smollm2_135m_e8t2", "dense=parent", *_INPUTS, "--until", "report", "--yes"),
        *_of_both(_TRAINING | {f"model.config.{name}": size for name, size in _MODEL.items()}),
    ],
    "start": ["parent", "texts", "--gpus", "0", "--steps", "4", "--dir", "mine"],
    "own module": [
        *("--factory", "my_recipes.chain(dense='parent',num_gpus=2)", *_INPUTS, "--only=import", "--yes"),
        *_of_both(_TRAINING),
    ],
}
#: Kind of run -> its folder.
PLACES = {"recipe": "runs/a", "start": "mine/parent_e8t2", "own module": "runs/a"}
#: End of a run -> part of the answer to the command that the run then prints. `ENDINGS_OF_START` are only for `start`.
ENDINGS = {
    "a trial": r" tokens +\S+ in 200 steps ",
    "a stop": r" in /.*/PLACE\. ",
    "a stop, noted": r" in /.*/PLACE\. ",
    "the end": r" tokens +\S+ in 600 steps ",
    "a refused loss": r"\n *pretrain\.optim\.config\.lr +0\.0005\n",
}
ENDINGS_OF_START = {"its files": r" tokens +\S+ in 4 steps ", "refused files": r" tokens +\S+ in 4 steps "}


def _stop(_: object, run_dir: Path, plan: Any, *__: object) -> NoReturn:
    """Replace the stages of a chain: end as if Ctrl-C had stopped them."""
    from nemo_upcycle.pipeline.run_here import stopped

    sys.stderr.write(stopped(signal.SIGINT, [plan.stage("pretrain")], run_dir, plan))
    raise SystemExit(128 + signal.SIGINT)


def _nemo(words: Sequence[str], folder: str, path: str) -> Answer:
    """Type a `nemo` command in a folder, with a PYTHONPATH."""
    os.environ["PYTHONPATH"] = path
    sys.path[:0] = path.split(os.pathsep)
    return type_commands([list(words)], folder, folder)[0]


def _start(*words: str) -> str:
    """Type `nemo-upcycle start`; return its output, followed by the output of the chain that it starts."""
    from nemo_upcycle.cli.main import main

    said, chain = io.StringIO(), []

    def execute(_: str, words: list[str], variables: Mapping[str, str]) -> NoReturn:
        chain.append(_nemo(words[1:], os.getcwd(), variables["PYTHONPATH"]).text)
        raise SystemExit

    os.execve = execute
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        main(["start", *words])
    return "\n".join([said.getvalue(), *chain])


def _report(finished: Path, command: Path, steps: int) -> str:
    """Write the report of a finished run as if the run had `steps` steps and a given command; return the text."""
    from nemo_upcycle.reporting.report import compose
    from nemo_upcycle.reporting.results import collect_results
    from nemo_upcycle.reporting.run_folder import read_run

    shutil.copy(command, finished)
    for name, key in (("training.json", "max_steps"), ("metrics.jsonl", "step")):
        path = finished / "pretrain" / name
        path.write_text(path.read_text().replace(f'"{key}": 4,', f'"{key}": {steps},'))
    environment = {
        "processor": "",
        "cores": 2,
        "memory_gib": 4,
        "gpus": [],
        "system": "",
        "commit": "",
        "versions": {},
    }
    return compose(collect_results(read_run(finished), environment) | {"figures": []}, finished)


def _found(pattern: str, text: str) -> str:
    found = re.findall(pattern, text, re.MULTILINE)
    assert len(found) == 1, text
    return str(found[0])


def _printed(kind: str, folder: str) -> dict[str, str]:
    """Start a run without its stages, and return the command that it prints for each kind of end."""
    from nemo_upcycle.pipeline import launch
    from nemo_upcycle.trainers.stop_error import stop_error
    from nemo_upcycle.trainers.stop_limits import StopReason

    os.chdir(folder)
    os.environ |= {"PATH": f"{Path(NEMO).parent}:{os.environ['PATH']}", "PYTHONPATH": MODULES}
    launch.run_stages = _stop
    run_dir, here = Path(folder, PLACES[kind]), f"cd {shlex.quote(folder)} && "
    found = {}
    if kind == "start":
        found["its files"] = here + _found(r"^run it:  (.*)", _start(*TYPED[kind]))
        said = _start(*TYPED[kind], "--yes")
        found["refused files"] = _found(
            r"continue with the existing files: `(.*)`", _start(*TYPED[kind], "--steps", "5")
        )
    else:
        said = _nemo(["upcycle", "pipeline", *TYPED[kind]], folder, MODULES).text
    found["a stop"] = here + _found(r"^Resume with the same command: (.*)", said)
    found["a stop, noted"] = (run_dir / "command.txt").read_text()
    reason = StopReason("loss", math.nan, "a finite number", first_step=9, last_step=9)
    error = stop_error(reason, run_dir / "pretrain", "nemo", rate=1e-3, aux_loss=0.0)
    found["a refused loss"] = _found("`(.*)`", str(error))
    for ending, steps in (("a trial", 4), ("the end", 300)):
        report = _report(Path(folder, "run"), run_dir / "command.txt", steps)
        assert ("Below 100 steps there is no verdict" in report) == (ending == "a trial")
        found[ending] = _found(r"^# train longer, .*\n(.*)", report)
    return found


def _pasted(line: str, elsewhere: Path) -> tuple[str, str, list[str]]:
    """Let a shell read a line, and return the folder, PYTHONPATH and arguments that `nemo` would get."""
    nemo = """nemo() { printf '%s\\0' "$PWD" "$PYTHONPATH" "$@"; }"""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = subprocess.run(["bash", "-ec", f"{nemo}\n{line}"], cwd=elsewhere, env=variables, stdout=-1, check=True)
    folder, path, *words = said.stdout.decode().split("\0")[:-1]
    return folder, path, words


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """For each kind of run, the command that it prints for each kind of end."""
    page = (ROOT / "docs/own_model.md").read_text(encoding="utf-8")
    module = re.findall(r"^```python\n# my_recipes\.py\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)[0]
    lines = {}
    for kind in TYPED:
        folder = tmp_path_factory.mktemp("typed here")
        unpack(max(PACKED), folder)
        (folder / MODULES).mkdir()
        (folder / MODULES / "my_recipes.py").write_text(module, encoding="utf-8")
        (lines[kind],) = run_ranks(_printed, 1, kind, str(folder), process_group=False)
    return lines


@pytest.mark.parametrize(
    ("kind", "ending"),
    [*((kind, ending) for kind in TYPED for ending in ENDINGS), *(("start", ending) for ending in ENDINGS_OF_START)],
)
def test_a_printed_command_would_run(
    kind: str, ending: str, printed: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    line = printed[kind][ending]
    folder, path, words = _pasted(line, tmp_path)
    dry = [word if word != "--yes" else "--dryrun" for word in words]
    (answer,) = run_ranks(_nemo, 1, dry, folder, path, process_group=False)
    assert answer.status == 0, f"{line}\n{answer.text}"
    assert "It would run" in answer.text
    wanted = (ENDINGS | ENDINGS_OF_START)[ending].replace("PLACE", PLACES[kind])
    assert re.search(wanted, answer.text), f"{line}\n{answer.text}"
    assert answer.written == []
