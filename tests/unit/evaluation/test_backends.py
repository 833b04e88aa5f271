"""Which back end an evaluation uses, and its arguments; stand-ins replace vLLM and the GPUs."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation import backends
from nemo_upcycle.evaluation.backends import CPU_BATCH, choose_backend, load_model, open_model


class FakeVLLM:
    """A stand-in for lm-eval's vLLM class that records its arguments."""

    given: dict[str, Any]

    def __init__(self, **given: Any) -> None:
        type(self).given = given
        self.model, self.add_bos_token = object(), None

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        FakeVLLM.asked = [request.args for request in requests]  # type: ignore[attr-defined]
        return [f"after {number}" for number, _ in enumerate(requests)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[Any]:
        return [self.add_bos_token]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate the parts of vLLM that this package uses, on a node with eight GPUs."""
    package = ModuleType("vllm")
    package.__spec__ = SimpleNamespace(name="vllm")  # type: ignore[assignment]
    archs = ["LlamaForCausalLM", "MixtralForCausalLM"]
    package.ModelRegistry = SimpleNamespace(get_supported_archs=lambda: archs)  # type: ignore[attr-defined]
    causal = ModuleType("lm_eval.models.vllm_causallms")
    causal.VLLM = FakeVLLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", package)
    monkeypatch.setitem(sys.modules, "lm_eval.models.vllm_causallms", causal)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)


def test_auto_is_transformers_without_vllm(tiny_llama: Path) -> None:
    assert choose_backend(tiny_llama, "auto", "bfloat16") == "hf"
    with pytest.raises(UpcycleError, match="Backend vllm of the suite cannot be used: vllm is not installed"):
        choose_backend(tiny_llama, "vllm", "bfloat16")


@pytest.mark.usefixtures("vllm")
def test_auto_is_vllm_for_its_classes_in_16_bits(tiny_llama: Path, tmp_path: Path) -> None:
    assert choose_backend(tiny_llama, "auto", "bfloat16") == "vllm"
    assert choose_backend(tiny_llama, "auto", "float32") == "hf"
    assert choose_backend(tiny_llama, "hf", "bfloat16") == "hf"
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["OtherForCausalLM"]}))
    assert choose_backend(tmp_path, "auto", "bfloat16") == "hf"
    with pytest.raises(UpcycleError, match="cannot be used: vLLM does not have OtherForCausalLM"):
        choose_backend(tmp_path, "vllm", "bfloat16")


@pytest.mark.usefixtures("vllm")
def test_vllm_gets_folder_type_gpus_and_batch(tiny_llama: Path) -> None:
    opened = open_model(tiny_llama, backend="auto", dtype="bfloat16", batch_size="auto", label="tiny")
    assert FakeVLLM.__subclasses__()[-1].given == {
        "pretrained": str(tiny_llama),
        "dtype": "bfloat16",
        "tensor_parallel_size": math.gcd(8, 4),  # the tiny model has four heads
        "batch_size": "auto",
    }
    assert (opened.name, opened.device, opened.batch_size) == ("vllm", "cuda x 4", "auto")
    assert opened.facts["class"] == "LlamaForCausalLM"
    assert opened.facts["parameters"] == load_model(tiny_llama)[0].num_parameters()
    continued = opened.continue_prompts([{"prompt": "one"}, {"prompt": "two"}])
    assert continued == [{"prompt": "one", "continuation": "after 0"}, {"prompt": "two", "continuation": "after 1"}]
    ((text, settings), _) = FakeVLLM.asked  # type: ignore[attr-defined]
    assert text == "one"
    assert settings == {"until": [], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0}
    assert opened.lm.loglikelihood_rolling([]) == [False]  # no second beginning-of-sequence token is added
    assert opened.lm.add_bos_token is None


def test_auto_batch_is_a_number_only_on_a_cpu(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: Any = {"backend": "auto", "dtype": "float32", "batch_size": "auto", "label": "tiny"}
    assert open_model(tiny_llama, **settings).batch_size == CPU_BATCH
    given: list[Any] = []
    loaded = load_model(tiny_llama)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(backends, "load_model", lambda folder, dtype: loaded)
    monkeypatch.setattr(backends, "wrap_model", lambda model, tokenizer, batch_size, label: given.append(batch_size))
    assert open_model(tiny_llama, **settings).batch_size == "auto"
    assert given == ["auto"]
