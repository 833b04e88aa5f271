"""A HybridModel is upcycled as a GPTModel is: the same bits in every layout, the same export, resumed alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.convert.offline import convert
from nemo_upcycle.errors import SpecError
from nemo_upcycle.sources.safetensors_folder import SafetensorsFolder
from tests.bridge.runs import VOCABULARY, run_config, train
from tests.distributed.ranks import run_ranks
from tests.models import write_llama, write_qwen3


pytest.importorskip("megatron.bridge", reason="`make test-bridge` has an environment with it")
SPEC: dict[str, Any] = {"num_experts": 4, "top_k": 2}
MIXED = SPEC | {"moe_layers": "every-2"}
SHARED: dict[str, Any] = {"num_experts": 8, "top_k": 4, "granularity": 2, "shared_experts": 1, "method": "noise"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tied Llama of four layers."""
    return write_llama(tmp_path_factory.mktemp("llama") / "dense", tied=True, vocab_size=VOCABULARY)


def _train(dense: Path, run: Path, fields: dict[str, Any] | None, options: dict[str, Any]) -> None:
    train(dense, run, fields, **options)


def _export(dense: Path, run: Path, output: Path) -> Path:
    from nemo_upcycle.cli.main import main

    assert main(["export", str(run), str(output), "--dense", str(dense), "--dtype", "float32"]) == 0
    return output


def _offline(dense: Path, output: Path, fields: dict[str, Any]) -> Path:
    with open_dense(dense) as source:
        convert(source, output, UpcycleSpec(**fields), dtype=torch.float32, progress=False)
    return output


def _same_bits(left: Path, right: Path) -> bool:
    with SafetensorsFolder(left) as one, SafetensorsFolder(right) as other:
        assert set(one.names()) == set(other.names())
        return all(torch.equal(one.read(name), other.read(name)) for name in one.names())


@pytest.mark.parametrize(
    ("pattern", "fields", "layout"),
    [
        ("*E*E*E*E", SPEC, {}),
        ("*E*-*E*-", MIXED, {}),
        ("*E*E*E*E", SHARED, {"tp": 2}),
        ("*E*E|*E*E", SPEC, {"pp": 2}),
        ("*E*E*E|*E", SPEC, {"pp": 2}),
        ("*E*-*|E*-", MIXED, {"pp": 2}),
        ("*E*E*E*E", SPEC, {"ep": 4}),
        ("*E*E*E*E", SHARED, {"tp": 2, "ep": 2, "etp": 1}),
        ("*E*E|*E*E", SPEC, {"tp": 2, "pp": 2, "ep": 2}),
        ("*E*E*E*E", SPEC, {"style": "builder", "ep": 2}),
        ("*E|*E|*E|*E", SPEC, {"style": "builder", "pp": 2, "vp": 2}),
        ("*|E*-*|E|*-", MIXED, {"style": "builder", "pp": 2, "vp": 2}),
    ],
    ids=str,
)
def test_the_checkpoint_has_the_bits_of_an_offline_conversion(
    dense: Path, tmp_path: Path, pattern: str, fields: dict[str, Any], layout: dict[str, Any]
) -> None:
    ranks = max(layout.get("tp", 1) * layout.get("pp", 1), layout.get("ep", 1))
    run_ranks(_train, ranks, dense, tmp_path / "run", fields, {"pattern": pattern, **layout}, process_group=False)

    exported = _export(dense, tmp_path / "run", tmp_path / "hf")
    assert _same_bits(exported, _offline(dense, tmp_path / "offline", fields))
