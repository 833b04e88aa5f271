"""Bridge's own export commands write an upcycled run bit-identically to `convert`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.convert.export import export_checkpoint
from nemo_upcycle.sources.safetensors_folder import SafetensorsFolder
from nemo_upcycle.utils.files import read_json
from tests.bridge.runs import SPEC, VOCABULARY, differences, offline, train_on_ranks
from tests.distributed.ranks import run_ranks
from tests.models import write_llama, write_qwen2, write_qwen3, write_tokenizer
from tests.tiers import every_pair


#: Class -> writer of its dense parent, and fields of the spec.
CLASSES: dict[str, tuple[Callable[..., Path], dict[str, Any]]] = {
    "MixtralForCausalLM": (write_llama, SPEC),
    "Qwen3MoeForCausalLM": (write_qwen3, SPEC),
    "Qwen2MoeForCausalLM": (write_qwen2, SPEC | {"shared_experts": 1}),
    "Glm4MoeForCausalLM": (write_llama, SPEC | {"router_score": "sigmoid"}),
}
LAYOUTS = [{"tp": 2, "pp": 2}, {"tp": 2, "ep": 2}]


@pytest.mark.parametrize(("hf_class", "style", "layout"), every_pair(CLASSES, ["provider", "builder"], LAYOUTS))
def test_bridge_exports_of_a_run_have_the_bits_of_convert(
    tmp_path: Path, hf_class: str, style: str, layout: dict[str, int]
) -> None:
    write, fields = CLASSES[hf_class]
    dense = write(tmp_path / "dense", layers=2, tied=layout == LAYOUTS[0], vocab_size=VOCABULARY)
    write_tokenizer(dense)
    converted = offline(dense, tmp_path / "offline", fields)
    assert read_json(converted / "config.json")["architectures"] == [hf_class]

    options = {"style": style, "hf_source": converted, "live": tmp_path / "live", **layout}
    train_on_ranks(4, dense, tmp_path / "run", fields, **options)
    (saved,) = (tmp_path / "run").glob("iter_*/hf*")
    exports = [saved, tmp_path / "live"]
    if style == "provider":  # Bridge cannot read back the models of its builders: docs/bridge_reference.md
        run_ranks(_export_ckpt, 1, converted, tmp_path / "run", tmp_path / "after", process_group=False)
        exports.append(tmp_path / "after")
    for exported in exports:
        assert differences(exported, converted) == [], exported.name


def test_biases_that_balance_experts_are_exported_alike(tmp_path: Path) -> None:
    fields = CLASSES["Glm4MoeForCausalLM"][1]
    dense = write_tokenizer(write_llama(tmp_path / "dense", layers=2, vocab_size=VOCABULARY))
    converted = offline(dense, tmp_path / "offline", fields)
    biases = {"moe_router_enable_expert_bias": True, "moe_router_load_balancing_type": "none"}
    options = {"model": biases, "hf_source": converted, "live": tmp_path / "live", "ep": 2}
    train_on_ranks(2, dense, tmp_path / "run", fields, **options)
    (saved,) = (tmp_path / "run").glob("iter_*/hf*")
    own = export_checkpoint(saved.parent, dense, tmp_path / "own", spec=UpcycleSpec(**fields), dtype=torch.float32)
    assert differences(saved, own) == differences(tmp_path / "live", own) == []
    names = [name for name in SafetensorsFolder(own).names() if name.endswith("e_score_correction_bias")]
    assert differences(own, converted) == names
    for name in names:  # after one update of size 0.001
        assert set(SafetensorsFolder(own).read(name).mul(1000).round().tolist()) <= {-1.0, 0.0, 1.0}


def _export_ckpt(offline: Path, run: Path, output: Path) -> None:
    from nemo_upcycle.cpu.backend import use_cpu_backend

    use_cpu_backend()
    from megatron.bridge import AutoBridge

    import nemo_upcycle.trainers.bridge.conversion  # noqa: F401

    AutoBridge.from_hf_pretrained(str(offline)).export_ckpt(run, output, show_progress=False, strict=True)
