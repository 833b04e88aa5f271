"""Load the model under evaluation strictly, and wrap it for lm-eval."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models import hf_model
from nemo_upcycle.suites.lm_eval_tasks import quiet
from nemo_upcycle.utils.progress import ProgressLine


def load_model(folder: Path, dtype: str = "float32") -> tuple[Any, Any]:
    """Load a Hugging Face causal language model and its tokenizer; check that every tensor was loaded.

    transformers only warns about a wrong tensor name, and keeps random weights for it.

    Args:
        folder: of the model.
        dtype: the type to compute in. On GPUs the model is spread over all that this process sees.

    Raises:
        CheckpointError: the folder is not such a model, or a tensor is missing, unexpected or of another shape.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"model {folder}",
            got="no config.json",
            expected="a Hugging Face folder with config.json, *.safetensors and tokenizer files",
            fix="check the path",
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
            f"model {folder}",
            got=f"{type(error).__name__}: {error}",
            expected="a model that transformers can load",
            fix="export the model again, with the tokenizer files of the dense model",
        ) from error
    wrong = {kind: sorted(map(str, names))[:5] for kind, names in info.items() if names}
    if wrong:
        raise CheckpointError(
            f"weights of {folder}",
            got=wrong,
            expected="exactly the tensors of the model",
            fix="export the model again with `nemo-upcycle export`",
        )
    return model.eval(), tokenizer


def wrap_model(model: Any, tokenizer: Any, batch_size: int | str, label: str) -> Any:
    """Return lm-eval's wrapper of a loaded model, with this package's progress report.

    Args:
        model: from `load_model`.
        tokenizer: likewise.
        batch_size: sequences in one forward pass; `auto` lets lm-eval find out how many fit the GPU.
        label: name of the model in the progress report.
    """
    from lm_eval.models.huggingface import HFLM

    class ReportingHFLM(HFLM):
        add_bos_token: bool | None
        _line: ProgressLine | None = None

        @contextmanager
        def _reporting(self, what: str, passes: int) -> Iterator[None]:
            with ProgressLine(f"{label}: {what}", total=passes) as self._line:
                yield
            self._line = None

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            # lm-eval adds the first token itself: a second one from the tokenizer would be predicted, too.
            kept, self.add_bos_token = self.add_bos_token, False
            try:
                with self._reporting("held-out text", len(requests)):
                    return super().loglikelihood_rolling(requests, disable_tqdm=True)
            finally:
                self.add_bos_token = kept

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            if self._line:  # a batch of held-out text
                return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
            # Answers to a question that differ only in their last token share one forward pass.
            passes = {(*context, *continuation[:-1]) for _, context, continuation in requests}
            with self._reporting("questions", len(passes)):
                return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> Any:
            line, self._line = self._line, None  # its passes are no progress
            try:
                return super()._detect_batch_size(requests, pos)
            finally:
                self._line = line

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, *args, **kwargs)
            if self._line:
                self._line.advance(len(inps))
            return logits

    with quiet():
        return ReportingHFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
