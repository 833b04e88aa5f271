"""`nemo-upcycle advise`: its table, its JSON, and what it decides."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.cli import advise
from nemo_upcycle.cli.main import main
from tests.unit.cli.conftest import Command, refused, write_config
from tests.unit.planning.test_advice import a_law


@pytest.fixture
def llama(tmp_path: Path) -> tuple[str, ...]:
    return ("advise", "--model", write_config(tmp_path), "--trained-on", "15T", "--gpus", "128")


def test_json_has_exactly_what_is_promised(command: Command, llama: tuple[str, ...]) -> None:
    values = command.values(*llama, "--hours", "48", "--price-per-gpu-hour", "2.5", status=1)
    assert set(values) == {"model", "options", "law", "best", "outcomes"}
    assert values["model"] == {"parameters": 8_030_261_248, "trained_on": 15e12}
    assert list(values["options"]) == ["dense", "upcycle e8t2", "new e8t2"]
    option = values["options"]["upcycle e8t2"]
    names = "fits layout tokens hours gpu_hours cost memory_gib active_parameters total_parameters served_bytes"
    assert set(option) == {*names.split(), "fitted"}
    assert (option["hours"], option["gpu_hours"], option["cost"]) == (48, 6144, 15_360)
    assert (option["total_parameters"], option["served_bytes"]) == (47_491_321_856, 94_982_643_712)
    assert set(option["fitted"]) == {"loss_difference", "band_90", "near", "beyond", "above_parent"}
    assert set(values["law"]) == {"about", "source", "why"}


def test_at_the_papers_8b_it_shows_what_was_measured_and_does_not_decide(
    capsys: pytest.CaptureFixture[str], llama: tuple[str, ...]
) -> None:
    assert main([*llama, "--tokens", "100B"]) == 1
    out = capsys.readouterr().out
    text = " ".join(out.split())
    assert "- for (1 and 1): Llama 3 8B after 15T tokens: MMLU 62.1 -> 64.1" in text
    assert "- against (0.133 and 0.147): OLMo 1B after 2T tokens: an MoE from nothing is level" in text
    assert "the parent's tokens are 750,125 times beyond its range" in text
    assert text.endswith("Verdict: not resolved.")
    assert len(out.splitlines()) <= 24, "one screen"


def test_what_does_not_fit_is_said(command: Command, llama: tuple[str, ...]) -> None:
    assert "upcycle e8t2 no fit" in command.text(*llama[:-1], "8", "--hours", "1", status=1)


def test_a_law_that_is_near_decides(command: Command, llama: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advise, "fitted_law", lambda: a_law(-0.05))
    values = command.values(*llama, "--tokens", "100B")
    assert values["best"] == "upcycle e8t2"
    assert values["options"]["upcycle e8t2"]["fitted"]["band_90"] == [-0.06, -0.04]
    assert values["options"]["new e8t2"]["fitted"] is None
    text = command.text(*llama, "--tokens", "100B")
    assert "Verdict: upcycle e8t2. That is of the loss alone" in text


def test_an_moe_is_no_parent(llama: tuple[str, ...]) -> None:
    moe = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
    write_config(Path(llama[2]), **moe)
    error = refused(*llama, "--tokens", "1B")
    assert (error.subject, error.got) == ("--model", "8 experts")
