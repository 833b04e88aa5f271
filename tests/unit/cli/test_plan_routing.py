"""`nemo-upcycle plan`: what its speed assumes of the router, and what NeMo 2.7 and Bridge do not have."""

from __future__ import annotations

import pytest

from nemo_upcycle.cli.main import main
from tests.unit.cli.test_plan import _json, _run


def test_the_speed_says_which_routing_it_assumes(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--recipe", "llama3_8b_e8t2", "--gpus", "128", "--capacity-factor", "0", "--layout", "pp=4,vp=8,ep=8")
    _run(*options)
    balanced = capsys.readouterr().out.replace("\n  ", " ")
    assert (
        "Speed: with balanced routing, as benchmarks force it; natural routing, as in training, takes about"
        in balanced
    )
    _run(*options, "--routing", "natural")
    assert "Speed: with natural routing, as in training." in capsys.readouterr().out
    rows = [_json(capsys, *options, *more)["rows"][0] for more in ((), ("--routing", "natural"))]
    assert rows[0]["tokens_per_s_per_gpu"] > rows[1]["tokens_per_s_per_gpu"]


def test_what_nemo_does_not_have_gets_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--recipe", "llama3_8b_e8t2", "--gpus", "128", "--capacity-factor", "0", "--layout", "pp=4,vp=8,ep=8")
    assert _json(capsys, *options)["rows"][0]["command"]
    assert not _json(capsys, *options, "--dispatcher", "hybridep", "--software", "mcore-0.17")["rows"][0].get(
        "command"
    )


def test_bridges_command_is_for_the_recipes_that_bridge_has(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--gpus", "64", "--backend", "bridge"]
    assert main(["plan", "--recipe", "qwen3_8b_dense_ct", *sizes]) == 2
    answer = capsys.readouterr().err
    assert "for Bridge llama3_8b_e8t2 or llama31_8b_e8t2 or " in answer
    assert "Fix: use --backend nemo" in answer
    assert main(["plan", "--recipe", "qwen3_8b_e8t2", *sizes]) == 0
    assert "-m nemo_upcycle.bridge" in capsys.readouterr().out
    assert main(["plan", "--recipe", "llama3_8b_e8t2", "--gpus", "64", "--backend", "megatron"]) == 2
    assert "bridge" in capsys.readouterr().err
