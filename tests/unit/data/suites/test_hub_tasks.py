"""lm-eval's tasks with a stand-in for the hub: available tasks are used, and other tasks are omitted with a reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hub import StandIn, repositories, serving


TASK = {
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices.text}}",
    "doc_to_target": 2,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
LOAD = """
import json, sys
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.data.suites.lm_eval_tasks import load_available_tasks

answers = []
for names in sys.argv[2:]:
    try:
        loaded, missing = load_available_tasks(names.split(), sys.argv[1], strict=names == "good script")
        answers.append([sorted(loaded), missing])
    except UpcycleError as error:
        answers.append([error.subject, error.got])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[StandIn]:
    content = repositories()
    arc = content["allenai/ai2_arc"]
    card = [{"config_name": "default", "data_files": [{"split": "test", "path": "ARC-Easy/test.jsonl"}]}]
    good = {"README.md": f"---\n{json.dumps({'configs': card})}\n---\n".encode()}
    good["ARC-Easy/test.jsonl"] = arc["ARC-Easy/test.jsonl"]
    content |= {f"acme/{name}": good for name in ("good", "ill", "closed")}
    content["acme/splitless"] = {path: file.replace(b'"test"', b'"train"') for path, file in good.items()}
    content["acme/script"] = {"README.md": b"---\nlicense: other\n---\n", "script.py": b"raise SystemExit(1)\n"}
    content["acme/empty"] = {"README.md": b"---\nlicense: other\n---\n"}
    with serving(content) as server:
        server.broken = {"acme/ill": 503, "acme/closed": 401}
        yield server


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that tests of whole suites and blends share; fetching MMLU's 57 data sets takes half a minute."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the user's own tasks, which read data sets of the hub: a working task, and a task for each fault."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("good", "ill", "closed", "script", "splitless", "empty", "nowhere"):
        task = {"task": name, "dataset_path": f"acme/{name}", **TASK}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return folder


def run(hub: StandIn, folder: Path, code: str, *words: object, **variables: str) -> Any:
    """Run a program with this hub and an empty cache; return the JSON on the last line of its output."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    quick = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    environment = mine | quick | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf")} | variables
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.full
def test_a_task_without_data_is_left_out_with_its_reason(hub: StandIn, own: Path, tmp_path: Path) -> None:
    some, strict, none = "splitless good script empty closed nowhere logiqa ill", "good script", "splitless nowhere"
    (loaded, missing), first, of_all = run(hub, tmp_path, LOAD, own, some, strict, none)
    assert loaded == ["good", "logiqa"]
    assert list(missing) == ["splitless", "script", "empty", "closed", "nowhere", "ill"]
    assert missing["script"].startswith("a data set that is a script, script.py")
    assert missing["splitless"].startswith("they have no 'test'")
    assert "acme/empty" in missing["empty"]
    assert "gated dataset" in missing["closed"]
    assert "'acme/nowhere' doesn't exist on the Hub" in missing["nowhere"]
    assert missing["ill"] == "status 503 of the Hugging Face hub"
    assert first == ["Data of lm-eval task script", f"are not available: {missing['script']}"]
    assert of_all == ["Data of splitless, nowhere", f"are not available ({missing['splitless']})"]


LOGIQA = """
import importlib.util, json
from pathlib import Path
import lm_eval
from nemo_upcycle.data.suites.lm_eval_tasks import load_tasks

(task,) = load_tasks(["logiqa"])["logiqa"]
path = Path(lm_eval.__file__).parent / "tasks/logiqa/utils_logiqa.py"
spec = importlib.util.spec_from_file_location("theirs", path)
theirs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(theirs)
pairs = []
for row in task.eval_docs:
    as_theirs = {**row, "question": row["query"], "label": "abcd"[row["correct_option"]]}
    pairs.append([task.doc_to_text(row), theirs.doc_to_text(as_theirs)])
    pairs.append([task.doc_to_target(row), theirs.doc_to_target(as_theirs)])
    pairs.append([task.doc_to_choice(row), row["options"]])
print(json.dumps([pairs, len(task.training_docs()), len(task.validation_docs())]))
"""


@pytest.mark.slow
def test_logiqa_is_asked_as_lm_eval_asks_it(hub: StandIn, tmp_path: Path) -> None:
    pairs, *others = run(hub, tmp_path, LOGIQA)
    assert len(pairs) == 18
    assert all(ours == theirs for ours, theirs in pairs)
    assert others == [26, 6]


SUITE = """
import json, sys
from pathlib import Path
from lm_eval.models.dummy import DummyLM
from nemo_upcycle.evaluation.backends import Backend
from nemo_upcycle.evaluation.run import ask
from nemo_upcycle.data.suites.suite import build_named_suite
from nemo_upcycle.data.suites.suite_config import read_suite_config

suite = build_named_suite(sys.argv[1], [], Path(sys.argv[2]))
found = ask(Backend(DummyLM(), {}, "none", 1), suite, samples=False, limit=2)
config = read_suite_config(sys.argv[1])
asked = [f"{task}_{shots}shot" if shots else task for task, numbers in config.tasks.items() for shots in numbers]
published = list(config.published.columns) if config.published else []
print(json.dumps([asked, sorted(found["metrics"]), found["missing"], published]))
"""


@pytest.mark.full
def test_every_task_of_the_papers_suite_is_scored(hub: StandIn, cache: Path, tmp_path: Path) -> None:
    asked, metrics, missing, published = run(hub, cache, SUITE, "paper", tmp_path / "suite")
    assert missing == {}
    assert set(asked) <= {metric.partition("/")[0] for metric in metrics}
    assert set(published) <= set(metrics)


BLEND = """
import json, sys
from pathlib import Path
from nemo_upcycle.data.blend import read_blend
from nemo_upcycle.data.contamination import build_index
from nemo_upcycle.data.inputs import list_inputs
from nemo_upcycle.data.suites.suite_config import read_suite_config

work = Path(sys.argv[2])
blend = read_blend(sys.argv[1])
files = {
    name: [file.path for file in list_inputs(blend, name, work)["train"]] for name in blend.config.sources
}
summary = build_index({"paper": read_suite_config("paper")}, work / "index.npz")
lines = {Path(path).stem: len(Path(path).read_text().splitlines()) for path in files["questions"]}
print(json.dumps([{name: len(paths) for name, paths in files.items()}, lines, summary["sets"]]))
"""


@pytest.mark.full
def test_every_source_and_question_of_a_hub_blend_is_had(hub: StandIn, cache: Path, tmp_path: Path) -> None:
    files, lines, sets = run(hub, cache, BLEND, "fineweb_edu_academic_7_3", tmp_path)
    assert len(lines) == 10
    assert set(lines.values()) == {26}
    found = {"fineweb_edu": 1, "flan": 2, "data_provenance": 2, "textbooks": 6, "arxiv_abstracts": 2, "questions": 10}
    assert files == found
    names = ("boolq", "logiqa", "mmlu", "openbookqa", "piqa", "sciq", "truthfulqa_mc2")
    assert {name: entry["items"] for name, entry in sets.items()} == {
        f"lm-eval/{name}": 57 * 6 if name == "mmlu" else 6 for name in names
    }
