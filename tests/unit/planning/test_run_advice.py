"""The advice for a run: a line that says what decides, and where nothing does the command that answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nemo_upcycle.cli.main import main
from nemo_upcycle.errors import SpecError
from nemo_upcycle.planning import run_advice
from nemo_upcycle.planning.hardware import known_recipe, known_shape, read_data
from nemo_upcycle.planning.law import Law, OptionLaw
from nemo_upcycle.planning.recipe_table import recipes
from nemo_upcycle.planning.run_advice import RunAdvice, advice_line, known_parent_tokens
from nemo_upcycle.spec import UpcycleSpec


LLAMA = known_recipe("llama3_8b_e8t2")
ADDRESS = LLAMA.inputs["dense"]


def _law(upcycled: float, parameters: float = LLAMA.dense.total_params) -> Law:
    """Return a fitted law of parents of 8T to 20T tokens: the upcycled model differs by a constant, +-0.01."""

    def option(loss: float) -> OptionLaw:
        coefficients = {"A": 0.0, "a": 0.1, "b": 0.1, "E": loss}
        draws = [[0.0, 0.1, 0.1, loss]] * 2
        sizes = ((8e12, 2e13), (5e10, 2e11), (parameters, parameters))
        return OptionLaw("product", coefficients, *sizes, draws, error=0.01)

    return Law("test", "here", {"dense": option(2.0), "upcycled_e8t2": option(2.0 + upcycled)})


def _line(law: Law | None, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> str:
    monkeypatch.setattr(run_advice, "fitted_law", lambda: law)
    given = {"address": ADDRESS, "trained_on": None, "arch": LLAMA.arch, "tokens": 1e11, "dense_tokens": 1e11}
    return advice_line(**(given | {"gpus": 512} | changes))


@pytest.mark.parametrize(
    ("law", "said"),
    [
        (
            _law(-0.05),
            "upcycle e8t2, by the fitted law: -0.050 nats a token beside the parent trained on"
            " (90 % -0.060 to -0.040); the published one does not hold so far out",
        ),
        (_law(0.05), "dense, by the fitted law: +0.050 nats a token"),
        (_law(0.005), "not resolved by the fitted law (the bands of 'dense' and 'upcycle e8t2' overlap)"),
        (_law(-0.05, 1e9), "no fitted law applies (the parameters are 8.0 times beyond its range"),
        (None, "no fitted law applies (none was fitted yet); the published one does not hold so far out"),
    ],
)
def test_a_line_says_what_the_fitted_law_decides(law: Law | None, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = _line(law, monkeypatch)
    assert line.startswith(f"e8t2 after 15T + 100B tokens: {said}")
    assert "\n" not in line
    assert line.endswith(
        f"Costs and more: nemo-upcycle advise --model {ADDRESS} --trained-on 15T --tokens 100B --experts 8 --top-k 2"
        " --gpus 512"
    )


def test_the_published_law_is_named_and_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = known_shape("smollm2_135m").upcycled(UpcycleSpec(num_experts=8, top_k=2))
    line = _line(None, monkeypatch, address="mine", trained_on="74B", arch=arch, tokens=37e9, dense_tokens=0)
    assert line.startswith(
        "e8t2 after 74B + 37B tokens: no fitted law applies (none was fitted yet); the published one, which never"
        " decides: -0.1"
    )
    other = known_shape("smollm2_135m").upcycled(UpcycleSpec(num_experts=16, top_k=4, granularity=2))
    line = _line(_law(-0.05), monkeypatch, trained_on="74B", arch=other)
    assert "no fitted law applies (it has no e16t4g2). Costs" in line
    assert "--experts 16 --top-k 4 --granularity 2" in line
    other = LLAMA.dense.upcycled(UpcycleSpec(num_experts=8, top_k=2, shared_experts=1, moe_layers="every-2"))
    line = _line(_law(-0.05), monkeypatch, arch=other)
    assert "no fitted law applies (it has no e8t2 with shared experts in some layers). Costs" in line


def test_a_baseline_of_more_tokens_counts_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    law = _law(-0.05)
    power = {"A": 2.0, "a": 0.0, "b": 0.05, "E": 2.0}
    dense = replace(law.options["dense"], coefficients=power, draws=[list(power.values())] * 2)
    law = replace(law, options={**law.options, "dense": dense})
    same, more = (_line(law, monkeypatch, dense_tokens=tokens) for tokens in (1e11, 1.6e11))
    assert same.partition(" nats")[0] != more.partition(" nats")[0]


def test_what_is_not_known_is_said_with_the_command_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    line = _line(None, monkeypatch, address="/models/my model")
    assert line == (
        "not known: what the parent was trained on; add trained_on=15T (its tokens), or ask: nemo-upcycle advise"
        " --model '/models/my model' --trained-on N --tokens 100B --experts 8 --top-k 2 --gpus 512"
    )
    line = _line(None, monkeypatch, tokens=0.0)
    assert line.startswith("not known: how long it trains; ask: nemo-upcycle advise --model")
    assert "--trained-on 15T --tokens N --experts 8" in line
    line = _line(None, monkeypatch, arch=None, tokens=0.0, gpus=None)
    assert line == (
        "not known before the parent is fetched; ask: nemo-upcycle advise"
        f" --model {ADDRESS} --trained-on 15T --tokens N --gpus N"
    )


def test_the_command_of_a_line_is_one_that_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    import json
    import shlex

    from tests.models import LLAMA3_8B

    (tmp_path / "config.json").write_text(json.dumps(LLAMA3_8B))
    line = _line(None, monkeypatch, address=str(tmp_path), trained_on="15T", tokens=100_000_595_968.0)
    words = shlex.split(line.partition("nemo-upcycle ")[2])
    assert main([*words, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["options"]["upcycle e8t2"]["tokens"] == 1e11


def test_tokens_are_the_users_or_those_of_a_published_parent() -> None:
    assert known_parent_tokens("/models/mine", None) is None
    assert known_parent_tokens(ADDRESS, None) == 15e12
    assert known_parent_tokens(ADDRESS, "300B") == 3e11
    with pytest.raises(SpecError, match=r"trained_on: got 'many', expected a number: 100B"):
        known_parent_tokens(ADDRESS, "many")
    assert all(known_parent_tokens(known_recipe(name).inputs["dense"], None) for name in recipes())
    assert all(entry["source"] and entry["tokens"] > 1e11 for entry in read_data("parents.yaml").values())


def test_values_have_every_law_that_has_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_advice, "fitted_law", lambda: _law(-0.05))
    parent = run_advice.DenseParent(15e12, LLAMA.dense.total_params)
    values = RunAdvice(parent, "e8t2", 1e11, 1e11).values()
    assert values["laws"]["fitted"]["decides"] is True
    assert values["laws"]["fitted"]["band_90"] == [-0.06, -0.04]
    assert values["laws"]["published"]["decides"] is False
    assert RunAdvice(parent, "e16t4", 1e11, 1e11).values()["laws"] == {}
