"""`nemo-upcycle advise`: its table, its JSON, what it refuses, and that it needs neither torch nor scipy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.cli import advise
from nemo_upcycle.cli.main import main
from nemo_upcycle.planning.law import Law, OptionLaw
from nemo_upcycle.utils.cache import CACHE_VARIABLE
from nemo_upcycle.utils.files import MARKER
from tests.models import LLAMA3_8B
from tests.waiting import HANG_S


@pytest.fixture
def llama(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3_8B))
    return str(tmp_path)


def _paper(llama: str, *options: str) -> list[str]:
    return ["advise", "--model", llama, "--trained-on", "15T", "--gpus", "128", *options]


def _json(capsys: pytest.CaptureFixture[str], words: list[str], status: int = 1) -> dict[str, Any]:
    assert main([*words, "--json"]) == status
    return json.loads(capsys.readouterr().out)


def test_json_has_exactly_what_is_promised(capsys: pytest.CaptureFixture[str], llama: str) -> None:
    values = _json(capsys, _paper(llama, "--hours", "48", "--price-per-gpu-hour", "2.5"))
    assert set(values) == {"model", "options", "law", "best", "outcomes"}
    assert values["model"] == {"parameters": 8_030_261_248, "trained_on": 15e12}
    assert list(values["options"]) == ["dense", "upcycle e8t2", "new e8t2"]
    option = values["options"]["upcycle e8t2"]
    assert set(option) >= {
        *("fits", "layout", "tokens", "hours", "gpu_hours", "cost", "memory_gib", "active_parameters"),
        *("total_parameters", "served_bytes"),
    }
    assert (option["hours"], option["gpu_hours"], option["cost"]) == (48, 6144, 15_360)
    assert (option["total_parameters"], option["served_bytes"]) == (47_491_321_856, 94_982_643_712)
    assert set(option["fitted"]) == {"loss_difference", "band_90", "near", "beyond", "above_parent"}
    assert set(values["law"]) == {"about", "source", "why"}


def test_at_the_papers_8b_it_shows_what_was_measured_and_does_not_decide(
    capsys: pytest.CaptureFixture[str], llama: str
) -> None:
    assert main(_paper(llama, "--tokens", "100B")) == 1
    out = capsys.readouterr().out
    text = " ".join(out.split())
    assert "- for (1 and 1): Llama 3 8B after 15T tokens: MMLU 62.1 -> 64.1" in text
    assert "- against (0.133 and 0.147): OLMo 1B after 2T tokens: an MoE from nothing is level" in text
    assert "the parent's tokens are 750,125 times beyond its range" in text
    assert text.endswith("Verdict: not resolved.")
    assert len(out.splitlines()) <= 24, "one screen"


def test_equal_tokens_cost_an_moe_more_hours(capsys: pytest.CaptureFixture[str], llama: str) -> None:
    options = _json(capsys, _paper(llama, "--tokens", "100B"))["options"]
    assert {option["tokens"] for option in options.values()} == {1e11}
    assert options["upcycle e8t2"]["hours"] > 1.5 * options["dense"]["hours"]
    assert options["new e8t2"]["hours"] == options["upcycle e8t2"]["hours"]


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str], llama: str) -> None:
    words = ["advise", "--model", llama, "--trained-on", "15T", "--gpus", "8", "--hours", "1"]
    assert main(words) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("upcycle e8t2"))
    assert "no fit" in line


def test_a_law_that_is_near_decides(
    capsys: pytest.CaptureFixture[str], llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def option(loss: float) -> OptionLaw:
        sizes = ((8e12, 2e13), (5e10, 2e11), (8e9, 8.1e9))
        return OptionLaw("product", {"A": 0.0, "a": 0, "b": 0, "E": loss}, *sizes, [[0.0, 0, 0, loss]] * 2, 0.01)

    law = Law("a test", "here", {"dense": option(2.0), "upcycled_e8t2": option(1.95)})
    monkeypatch.setattr(advise, "fitted_law", lambda: law)
    values = _json(capsys, _paper(llama, "--tokens", "100B"), status=0)
    assert values["best"] == "upcycle e8t2"
    assert values["options"]["upcycle e8t2"]["fitted"]["band_90"] == [-0.06, -0.04]
    assert values["options"]["new e8t2"]["fitted"] is None
    assert main(_paper(llama, "--tokens", "100B")) == 0
    out = capsys.readouterr().out
    assert "- upcycle e8t2: -0.050 nats a token beside `dense` (90 % -0.060 to -0.040)" in out
    assert "Verdict: upcycle e8t2. That is of the loss alone" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trained-on", "many", "--tokens", "1B"], "--trained-on: got 'many', expected a number: 100B"),
        (["--tokens", "1B", "--hours", "2"], "not allowed with argument"),
        ([], "one of the arguments --hours --tokens is required"),
        (["--hours", "-1"], "--hours: got -1.0, expected a number, 0.001 to 1e+06"),
        (["--tokens", "1e30"], "--tokens: got '1e30', expected a number: 100B, 1.5T, 500M or 1e11, at most 1e+18"),
        (["--tokens", "1B", "--seq-length", "0"], "--seq-length: got 0, expected 1 to 1,000,000,000"),
        (["--tokens", "1B", "--experts", "8,16"], "--experts: got '8,16', expected a whole number"),
        (["--tokens", "1B", "--top-k", "9"], "--top-k: got 9, expected a whole number, 1 to 8 (--experts)"),
        (["--tokens", "1B", "--gpu", "h10"], "--gpu 'h10' does not exist. Did you mean 'h100'?"),
        (["--tokens", "1B", "--grid", "runs/budget"], "option '--grid' does not exist."),
    ],
)
def test_mistakes_are_said_in_the_users_words(
    capsys: pytest.CaptureFixture[str], llama: str, options: list[str], said: str
) -> None:
    words = _paper(llama, *options)
    if "--trained-on" in options:
        del words[3:5]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in " ".join(err.split())


def test_an_moe_is_no_parent(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    moe = LLAMA3_8B | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(moe))
    assert main(_paper(str(tmp_path), "--tokens", "1B")) == 2
    assert "--model: got 8 experts, expected a dense model" in capsys.readouterr().err


def test_it_advises_without_what_takes_time_to_import(llama: str, tmp_path: Path) -> None:
    made = tmp_path / "cache/dense/smollm2-135m"  # an asset that an earlier command made
    made.mkdir(parents=True)
    shutil.copy(f"{llama}/config.json", made)
    (made / MARKER).touch()
    code = (
        "import sys\n"
        "from nemo_upcycle.cli.main import main\n"
        f"assert main({_paper(llama, '--hours', '48', '--json')!r}) == 1\n"
        "assert not {'torch', 'numpy', 'scipy', 'megatron', 'nemo', 'filelock'} & set(sys.modules)\n"
        f"assert main({_paper('asset://smollm2-135m', '--hours', '48', '--json')!r}) == 1\n"
        "assert not {'torch', 'numpy', 'megatron', 'nemo'} & set(sys.modules)\n"
    )
    variables = os.environ | {CACHE_VARIABLE: str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S, env=variables)
    assert done.returncode == 0, done.stderr
