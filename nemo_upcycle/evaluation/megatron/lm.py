"""The model of lm-eval for NeMo and Megatron checkpoints: `lm_eval --model nemo_upcycle --model_args checkpoint=...`.

The first rank of the job asks. The other ranks serve the first rank until it ends. Therefore only the first rank
reads, tokenises and prints tasks. Texts are tokenised as by lm-eval's model `hf`, except that the first token of a
held-out text is added only once.
"""

from __future__ import annotations

import atexit
import contextlib
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nemo_upcycle.convert.found import find_trained_model
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.megatron.chunks import layout_here, load_chunks
from nemo_upcycle.evaluation.megatron.generate import generate
from nemo_upcycle.evaluation.megatron.score import Scored, score
from nemo_upcycle.models.hf_model import load_tokenizer
from nemo_upcycle.utils.dtypes import dtype_of
from nemo_upcycle.utils.progress import ProgressLine


#: Time that a rank waits for a question. Without this setting, NCCL ends the job after ten minutes.
_PATIENCE = timedelta(days=7)
_STOP = "stop"


class MegatronLM(HFLM):
    """A checkpoint, or the live model of a training job, with the interface that lm-eval expects.

    Args:
        checkpoint: a checkpoint, a folder of checkpoints, or a run; required.
        dense: Hugging Face folder of the dense parent, whose tokenizer is used; None means the folder in the run's
            receipt.
        tp: number of ranks that share every matrix.
        pp: number of ranks that share the layers.
        ep: number of ranks that share the experts.
        dtype: type to compute in.
        batch_size: sequences in one pass, or `auto`.
        max_length: sequence length (tokens); None means the length for which the model was trained.
        add_bos_token: whether every text begins with the first token; if None, the tokenizer decides.
        label: name of the model in the progress report.
        others: arguments that lm-eval passes to every model (`device`, `max_batch_size`), and spec fields (`top_k`,
            `router_order`, ...) for a checkpoint that does not store its routing settings.

    Raises:
        UpcycleError: the checkpoint, the parent or the tokenizer is missing, or the layout does not fit the model.

    Example:
        torchrun --nproc-per-node 8 -m nemo_upcycle.evaluation run --model nemo_upcycle \\
            --model_args checkpoint=runs/8b,ep=8 --tasks mmlu --num_fewshot 5
    """

    def __init__(  # noqa: PLR0913 - lm-eval passes --model_args by name
        self,
        checkpoint: str | None = None,
        dense: str | None = None,
        *,
        tp: int = 1,
        pp: int = 1,
        ep: int = 1,
        dtype: str = "bfloat16",
        batch_size: int | str | None = "auto",
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        label: str = "evaluate",
        device: str | None = None,
        max_batch_size: int | None = None,
        **others: Any,
    ) -> None:
        super(HFLM, self).__init__()
        if checkpoint is None:
            raise UpcycleError(
                "checkpoint", kind="missing", got="is missing", fix="write checkpoint=FOLDER, a checkpoint or a run"
            )
        model = find_trained_model(Path(checkpoint), Path(dense) if dense else None, given=others)
        self.tokenizer = _tokenizer_of(model.dense)
        layout = layout_here(tp=int(tp), pp=int(pp), ep=int(ep))
        self.chunks, self.arch = load_chunks(model.checkpoint, model.dense, model.spec, layout, dtype_of(dtype))
        self.checkpoint, self.dense, self.vocab_size = model.checkpoint, model.dense, self.arch.vocab_size
        self._info = {
            "model_num_parameters": self.arch.total_params,
            "model_dtype": dtype,
            "checkpoint": str(model.checkpoint),
        }
        self._prepare(batch_size, max_length or self.arch.max_positions, add_bos_token, label)
        if torch.distributed.get_rank() > 0:
            self.serve()
            raise SystemExit(0)
        atexit.register(self.close)

    @classmethod
    def live(cls, chunks: Sequence[Any], tokenizer: Path, vocab_size: int, max_length: int) -> MegatronLM:
        """Return the model of a training job, on every rank: the first rank asks, the other ranks `serve`.

        Args:
            chunks: chunks of this rank, wrapped or not.
            tokenizer: folder of the tokenizer.
            vocab_size: V without padding.
            max_length: sequence length (tokens).
        """
        lm = cls.__new__(cls)
        super(HFLM, lm).__init__()
        lm.chunks, lm.tokenizer, lm.vocab_size = list(chunks), _tokenizer_of(tokenizer), vocab_size
        lm._info = {}
        lm._prepare("auto", max_length, None, "evaluate")
        return lm

    def _prepare(self, batch_size: int | str | None, max_length: int, bos: bool | None, label: str) -> None:
        """Set the attributes that lm-eval's class reads, and the group over which the ranks communicate."""
        if (tokens := len(self.tokenizer)) > self.vocab_size:
            raise UpcycleError(
                "The tokenizer",
                kind="state",
                got=f"has {tokens} tokens, but the model has only {self.vocab_size}",
                fix="use the tokenizer that the model was trained with",
            )
        self.backend, self.add_bos_token, self.custom_prefix_token_id = "causal", bos, None
        self.truncation, self.enable_thinking, self.think_end_token = False, None, None
        self.chat_template_args: dict[str, Any] = {}
        self.batch_size_per_gpu = batch_size or "auto"
        self._max_length = int(max_length)
        self._label = label
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._rank, self._world_size = 0, 1  # lm-eval sees a single rank
        self._commands: Any = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)

    def _ask(self, name: str, *arguments: Any) -> Any:
        """Make all ranks call the same method together."""
        torch.distributed.broadcast_object_list([(name, arguments)], src=0, group=self._commands)
        return getattr(self, name)(*arguments)

    def serve(self) -> None:
        """Take part in the calls of the first rank until that rank calls `close`."""
        while True:
            asked: list[Any] = [None]
            torch.distributed.broadcast_object_list(asked, src=0, group=self._commands)
            name, arguments = asked[0]
            if name == _STOP:
                return
            with contextlib.suppress(UpcycleError):  # all ranks meet the same error, and the first rank reports it
                getattr(self, name)(*arguments)

    def close(self) -> None:
        """Let the other ranks end."""
        atexit.unregister(self.close)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.broadcast_object_list([(_STOP, ())], src=0, group=self._commands)

    def _score(self, sequences: list[Scored], batch_size: int | str) -> list[tuple[list[float], bool]]:
        with self._line("score", len(sequences)) as line:
            return score(
                self.chunks,
                sequences,
                vocab_size=self.vocab_size,
                batch_size=batch_size,
                progress=line.advance,
            )

    def _generate(self, prompts: list[list[int]], stops: list[str], most: int, batch_size: int) -> list[list[int]]:
        def ends(number: int, written: list[int]) -> bool:
            text = self.tok_decode(written, skip_special_tokens=False)
            return any(stop in text for stop in stops)

        with self._line("generate", len(prompts)) as line:
            return generate(
                self.chunks,
                prompts,
                most=most,
                ends=ends,
                vocab_size=self.vocab_size,
                batch_size=batch_size,
                progress=line.advance,
            )

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score continuations; requests that differ only in the last token go through the model once."""
        sequences = [((*context, *continuation), len(continuation)) for _, context, continuation in requests]
        limit = self._max_length + 1
        if (longest := max((predicted for _, predicted in sequences), default=0)) >= limit:
            raise UpcycleError(
                "An answer",
                kind="state",
                got=f"has {longest} tokens, but a sequence has at most {self._max_length}",
                fix="raise max_length if the model was trained on longer sequences, or omit the task",
            )
        sequences = [(tokens[-limit:], predicted) for tokens, predicted in sequences]
        scored = self._ask("_score", sequences, self.batch_size)
        answers = [(sum(likelihoods), likeliest) for likelihoods, likeliest in scored]
        for (text, *_), answer in zip(requests, answers, strict=True):
            if text is not None:
                self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, each from its first token on."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            tokens = self.tokenizer.encode(request.args[0], add_special_tokens=False)
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self._max_length, 1)
            windows += [(None, *make_disjoint_window(window)) for window in rolling]
            counts.append(len(windows))
        answers = [likelihood for likelihood, _ in self._loglikelihood_tokens(windows)]
        starts = [0, *counts[:-1]]
        sums = [sum(answers[start:stop]) for start, stop in zip(starts, counts, strict=True)]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continue prompts with the likeliest tokens until a stop text appears.

        Raises:
            UpcycleError: a task wants tokens drawn at random.
        """
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number, request in enumerate(requests):
            wanted = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            if wanted["do_sample"]:
                raise UpcycleError(
                    f"Task {request.task_name}",
                    kind="refused",
                    got=(
                        f"generates with temperature {wanted['temperature']}, but a Megatron checkpoint can only "
                        "generate the likeliest tokens"
                    ),
                    fix="add --gen_kwargs do_sample=False, or evaluate the exported folder with vLLM",
                )
            stops = tuple(handle_stop_sequences(list(wanted["until"]), eos=eos))
            groups.setdefault((stops, wanted["max_gen_toks"]), []).append(number)
        texts: dict[int, str] = {}
        for (stops, most), numbers in groups.items():
            if (room := self._max_length - most) < 1:
                raise UpcycleError(
                    "number of tokens to generate",
                    got=most,
                    expected=f"fewer than the {self._max_length} tokens of a sequence",
                    fix="add --gen_kwargs max_gen_toks=N",
                )
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            size = 8 if self.batch_size == "auto" else int(self.batch_size)
            written = self._ask("_generate", prompts, list(stops), most, size)
            for number, tokens in zip(numbers, written, strict=True):
                text = postprocess_generated_text(self.tok_decode(tokens), list(stops), None)
                texts[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return [texts[number] for number in range(len(requests))]

    def _line(self, what: str, total: int) -> ProgressLine:
        return ProgressLine(f"{self._label}: {what}", total, enabled=torch.distributed.get_rank() == 0)

    def get_model_info(self) -> dict[str, Any]:
        """Describe the model for lm-eval's results."""
        return self._info


def _tokenizer_of(dense: Path) -> Any:
    try:
        return load_tokenizer(dense)
    except (OSError, ValueError) as error:
        raise UpcycleError(
            f"Tokenizer of {dense}",
            kind="state",
            got=f"cannot be loaded ({type(error).__name__}: {error})",
            fix="name the folder of the parent, with its tokenizer files (dense=FOLDER, --dense FOLDER)",
        ) from None
