"""`nemo-upcycle start --yes` goes from a model's folder and a folder of texts to a report, without any edit."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest
import transformers
from lm_eval._cli.harness import HarnessCLI

from nemo_upcycle.data.environment import data_python
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.attributes import temporarily_set
from nemo_upcycle.utils.files import read_json
from tests.functional.started import Command
from tests.models import write_llama, write_qwen3, write_tokenizer
from tests.parents import write_wrapped


pytestmark = [pytest.mark.slow, pytest.mark.full]


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(write_llama, id="llama"),
        pytest.param(write_qwen3, id="qwen3", marks=pytest.mark.weekly),
        pytest.param(partial(write_wrapped, kind="Mistral3"), id="mistral3", marks=pytest.mark.weekly),
        pytest.param(partial(write_wrapped, kind="Qwen3VL"), id="qwen3_vl", marks=pytest.mark.weekly),
    ],
)
def test_a_model_and_texts_end_in_a_report(tmp_path: Path, write: object) -> None:
    try:
        data_python()
    except UpcycleError as error:
        pytest.skip(str(error))
    assert callable(write)
    write_tokenizer(write(tmp_path / "parent", vocab_size=259, layers=2))
    (tmp_path / "texts/more").mkdir(parents=True)
    texts = [f"{number} words and {number * 7} more of them. " * 20 for number in range(60)]
    lines = "".join(json.dumps({"content": text, "url": "u"}) + "\n" for text in texts[:40])
    (tmp_path / "texts/more/a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for number, text in enumerate(texts[40:]):
        (tmp_path / f"texts/{number:02}.txt").write_text(text)
    words = [str(Path(sys.executable).with_name("nemo-upcycle")), "start", "parent", "texts", "--gpus", "0"]
    words += ["--steps", "4", "--dir", "mine", "--yes"]
    done = Command(tmp_path / "console.txt", *words)
    assert done.wait() == 0, done.text()[-4000:]
    assert done.text().count(f"parent: {tmp_path / 'parent'}\n") == 2, "both trainings name it"
    run = tmp_path / "mine/parent_e8t2"
    assert read_json(run / "receipt.json")["within_tolerance"] is True
    parent, made = (read_json(folder / "config.json") for folder in (tmp_path / "parent", run / "hf"))
    assert made.get("vision_config", {}).keys() == parent.get("vision_config", {}).keys()
    _, found = getattr(transformers, *made["architectures"]).from_pretrained(run / "hf", output_loading_info=True)
    assert not any(found.values()), found
    report = (run / "report.md").read_text(encoding="utf-8")
    assert report.startswith("# parent_e8t2\n")
    assert "bits per byte" in report
    _go_on(run, in_full=write is write_qwen3)
    for stage in ("pretrain", "dense_ct"):
        metrics = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
        assert max(line["step"] for line in metrics if "loss" in line) == 4


def _go_on(run: Path, *, in_full: bool) -> None:
    """Type the report's next commands: run or forecast a longer training, and parse the words of an evaluation."""
    block = run.joinpath("report.md").read_text().partition("## Next steps\n\n```bash\n")[2].partition("\n```")[0]
    longer, tasks = (line for line in block.splitlines() if not line.startswith("#"))
    done = Command.pasted(run / "next.txt", longer if in_full else longer.replace(" --yes", " --dryrun"))
    assert done.wait() == 0, done.text()
    assert re.search(r"[ /]200 " if in_full else r" tokens +\S+ in 200 steps ", done.text()), done.text()
    words = shlex.split(tasks.partition(" && ")[2])
    assert Path(words[0]).name == "lm_eval"
    with temporarily_set(sys, "argv", words):
        assert HarnessCLI().parse_args().tasks == ["mmlu", "piqa"]
