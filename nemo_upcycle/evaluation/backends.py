"""Back ends of an evaluation: transformers (checked tensor by tensor), vLLM (faster on GPUs), Megatron (no export)."""

from __future__ import annotations

import gc
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.data.suites.lm_eval_tasks import quiet
from nemo_upcycle.errors import CheckpointError, UpcycleError
from nemo_upcycle.models import hf_model
from nemo_upcycle.models.wrapper import read_config
from nemo_upcycle.utils.attributes import temporarily_set
from nemo_upcycle.utils.files import read_json, sha256_file
from nemo_upcycle.utils.progress import ProgressLine


#: Sequences in one forward pass on a CPU, where memory is not the limit.
CPU_BATCH = 8
#: Number of tokens in a continuation. A small model writes this many tokens in one or two seconds on two CPU cores.
NEW_TOKENS = 24


class Backend:
    """A loaded model, and the object through which lm-eval asks the model.

    Args:
        lm: lm-eval's object for the model.
        facts: facts about the model for the result, such as `class` and `parameters`.
        device: readable name of the device.
        batch_size: sequences in one forward pass, or `auto`.
    """

    name = "hf"

    def __init__(self, lm: Any, facts: dict[str, Any], device: str, batch_size: int | str) -> None:
        self.lm, self.facts, self.device, self.batch_size = lm, facts, device, batch_size

    def continue_prompts(self, prompts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the prompts, each with its `continuation`: the likeliest tokens, `NEW_TOKENS` at most.

        This method does not use `model.generate`, which would apply the temperature and penalties of the folder's
        generation_config.json.
        """
        return [{**prompt, "continuation": _continued(self.lm, prompt["prompt"])} for prompt in prompts]


class AskedBackend(Backend):
    """A model that is reached only through lm-eval: in vLLM (not verified on GPUs) or in Megatron."""

    def __init__(self, name: str, lm: Any, facts: dict[str, Any], device: str, batch_size: int | str) -> None:
        super().__init__(lm, facts, device, batch_size)
        self.name = name

    def continue_prompts(self, prompts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the prompts, each with its `continuation`, in one batch."""
        from lm_eval.api.instance import Instance

        settings = {"until": [], "max_gen_toks": NEW_TOKENS, "do_sample": False, "temperature": 0.0}
        arguments = [(prompt["prompt"], dict(settings)) for prompt in prompts]
        requests = [Instance("generate_until", {}, pair, number) for number, pair in enumerate(arguments)]
        texts = self.lm.generate_until(requests, disable_tqdm=True) if requests else []
        return [{**prompt, "continuation": text} for prompt, text in zip(prompts, texts, strict=True)]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Options for opening a model in an evaluation. An option that is None or omitted has the suite's value.

    Args:
        backend: `hf`, `vllm`, `megatron` or `auto`; None for the suite's value.
        batch_size: sequences in one forward pass, or `auto`; None for the suite's value.
        megatron: arguments of `MegatronLM`, to open a checkpoint.
    """

    backend: str | None = None
    batch_size: int | str | None = None
    megatron: Mapping[str, Any] | None = None


def open_model(
    folder: Path,
    *,
    backend: str,
    dtype: str,
    batch_size: int | str,
    label: str,
    megatron: Mapping[str, Any] | None = None,
) -> Backend:
    """Load a model for an evaluation, over all GPUs that this process sees.

    Args:
        folder: a Hugging Face folder; for Megatron a checkpoint, a folder of checkpoints, or a run.
        backend: `hf`, `vllm`, `megatron`, or `auto`, see `choose_backend`.
        dtype: type to compute in.
        batch_size: sequences in one forward pass; `auto` fills the GPUs' memory, and means `CPU_BATCH` on a CPU.
        label: name of the model in the progress report.
        megatron: arguments of `MegatronLM`, to open a checkpoint. In a job, all ranks except the first only serve
            the first rank, and end afterwards.

    Raises:
        CheckpointError: the folder is not a model, or its weights do not fit the model exactly.
        UpcycleError: vLLM is asked for but cannot be used.
    """
    import torch

    chosen = choose_backend(folder, backend, dtype)
    if chosen == "megatron":
        return _open_in_megatron(folder, dtype, batch_size, label, megatron or {})
    if batch_size == "auto" and not torch.cuda.is_available():
        batch_size = CPU_BATCH
    if chosen == "vllm":
        return _open_in_vllm(folder, dtype, batch_size)
    model, tokenizer = load_model(folder, dtype)
    lm = wrap_model(model, tokenizer, batch_size, label)
    facts = {**_facts(folder, type(model).__name__), "parameters": model.num_parameters()}
    return Backend(lm, facts, str(model.device), batch_size)


def choose_backend(folder: Path, wanted: str, dtype: str) -> str:
    """Return the back end for a folder: `hf`, `vllm` or `megatron`.

    Megatron evaluates every checkpoint, and no Hugging Face folder. For 16-bit types, `auto` means vLLM if vLLM is
    installed, sees CUDA and supports the model's class. For float32, `auto` means transformers, because float32 is
    used to compare models item by item, and transformers loads models strictly.

    Raises:
        UpcycleError: vLLM is asked for, but something that it needs is missing.
    """
    import torch

    if folder.is_dir() and not (folder / "config.json").is_file():
        return "megatron"
    if wanted in ("hf", "megatron") or (wanted == "auto" and dtype == "float32"):
        return "hf"
    got = ""
    if importlib.util.find_spec("vllm") is None:
        got = "vllm is not installed in this environment"
    elif not torch.cuda.is_available():
        got = "torch sees no GPU"
    elif not (names := set(_config(folder).get("architectures") or [])) & set(_classes_of_vllm()):
        got = f"vLLM does not have {', '.join(sorted(names)) or 'a class of no name'}"
    if got and wanted == "vllm":
        raise UpcycleError(
            "Backend vllm of the suite", kind="refused", got=f"cannot be used: {got}", fix="set backend: auto, or hf"
        )
    return "hf" if got else "vllm"


def close_model(backend: Backend) -> None:
    """End the other ranks and free GPU memory before the next model is loaded; vLLM reserves most of the memory."""
    import torch

    if backend.name == "megatron":
        backend.lm.close()
        backend.lm.chunks = []
    if torch.cuda.is_available():
        if backend.name == "vllm":
            backend.lm.model = None
        gc.collect()
        torch.cuda.empty_cache()


def _classes_of_vllm() -> Sequence[str]:
    from vllm import ModelRegistry

    return list(ModelRegistry.get_supported_archs())


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}


def _facts(folder: Path, name: str) -> dict[str, Any]:
    return {"class": name, "config_sha256": sha256_file(folder / "config.json")}


def _open_in_megatron(
    folder: Path, dtype: str, batch_size: int | str, label: str, options: Mapping[str, Any]
) -> Backend:
    from nemo_upcycle.evaluation.megatron.lm import MegatronLM

    with quiet():
        lm = MegatronLM(str(folder), dtype=dtype, batch_size=batch_size, label=label, **options)
    facts = {**_facts(lm.dense, "Megatron GPTModel"), "parameters": lm.arch.total_params, "dense": str(lm.dense)}
    return AskedBackend("megatron", lm, facts, str(lm.device), lm.batch_size)


def _open_in_vllm(folder: Path, dtype: str, batch_size: int | str) -> Backend:
    import torch
    from lm_eval.models.vllm_causallms import VLLM

    class RollingVLLM(VLLM):
        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with temporarily_set(self, "add_bos_token", False):  # as in `wrap_model`
                return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    config, gpus = read_config(folder), torch.cuda.device_count()
    # Each GPU must get the same number of heads. On 8 GPUs, a model with 9 heads can use only one GPU, and a model
    # with 32 heads can use all GPUs.
    tensor_parallel = math.gcd(gpus, config.get("num_attention_heads") or 1)
    with quiet():
        lm = RollingVLLM(
            pretrained=str(folder), dtype=dtype, tensor_parallel_size=tensor_parallel, batch_size=batch_size
        )
    facts = {
        **_facts(folder, _config(folder)["architectures"][0]),
        "parameters": hf_model.empty_model(folder).num_parameters(),
    }
    return AskedBackend("vllm", lm, facts, f"cuda x {tensor_parallel}", batch_size)


def load_model(folder: Path, dtype: str = "float32") -> tuple[Any, Any]:
    """Load a Hugging Face causal language model and its tokenizer, and check that every tensor was loaded.

    transformers itself only warns about a wrong tensor name, and keeps random weights for that tensor.

    Args:
        folder: folder of the model.
        dtype: type to compute in. If there are GPUs, the model is spread over all GPUs that this process sees.

    Raises:
        CheckpointError: the folder is not a causal language model, or a tensor is missing, unexpected or has another
            shape.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"Model folder {folder}",
            kind="missing",
            got="has no config.json",
            fix="give a Hugging Face folder with config.json, *.safetensors and tokenizer files",
        )
    import torch

    try:
        model, info = hf_model.load_model(
            folder,
            dtype=getattr(torch, dtype),
            device_map="auto" if torch.cuda.is_available() else None,
            use_safetensors=True,
            output_loading_info=True,
        )
        tokenizer = hf_model.load_tokenizer(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"Model {folder}",
            kind="state",
            got=f"cannot be loaded by transformers ({type(error).__name__}: {error})",
            fix="export the model again, with the tokenizer files of the parent",
        ) from error
    wrong = {kind: sorted(map(str, names))[:5] for kind, names in info.items() if names}
    if wrong:
        raise CheckpointError(
            f"Weights of {folder}",
            kind="state",
            got=f"do not match the model's class: {wrong}",
            fix="export the model again with `nemo-upcycle export`",
        )
    return model.eval(), tokenizer


def wrap_model(model: Any, tokenizer: Any, batch_size: int | str, label: str) -> Any:
    """Return lm-eval's wrapper of a loaded model, with this package's progress report.

    Args:
        model: from `load_model`.
        tokenizer: from `load_model`.
        batch_size: sequences in one forward pass; with `auto`, lm-eval finds the number that fits the GPU.
        label: name of the model in the progress report.
    """
    from lm_eval.models.huggingface import HFLM

    class ReportingHFLM(HFLM):
        _line: ProgressLine | None = None

        @contextmanager
        def _reporting(self, what: str, passes: int) -> Iterator[None]:
            with ProgressLine(f"{label}: {what}", total=passes) as self._line:
                yield
            self._line = None

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            # lm-eval adds the first token itself. If the tokenizer adds it too, lm-eval scores it as text.
            with temporarily_set(self, "add_bos_token", False), self._reporting("held-out text", len(requests)):
                return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            if self._line:  # a batch of held-out text
                return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
            # Answers to a question that differ only in their last token share one forward pass.
            passes = {(*context, *continuation[:-1]) for _, context, continuation in requests}
            with self._reporting("questions", len(passes)):
                return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with self._reporting("texts written", len(requests)):
                return super().generate_until(requests, disable_tqdm=True)

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            written = super()._model_generate(context, *args, **kwargs)
            if self._line:
                self._line.advance(len(context))
            return written

        def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> Any:
            with temporarily_set(self, "_line", None):  # do not report passes that detect the batch size
                return super()._detect_batch_size(requests, pos)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, *args, **kwargs)
            if self._line:
                self._line.advance(len(inps))
            return logits

    with quiet():
        return ReportingHFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _continued(lm: Any, text: str) -> str:
    import torch

    model, tokenizer = lm.model, lm.tokenizer
    tokens_1S = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
    written: list[int] = []
    cache = None
    with torch.inference_mode():
        while len(written) < NEW_TOKENS:
            output = model(input_ids=tokens_1S, past_key_values=cache, use_cache=True)
            cache, tokens_1S = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
            if tokens_1S.item() == tokenizer.eos_token_id:
                break
            written.append(int(tokens_1S.item()))
    return str(tokenizer.decode(written))
