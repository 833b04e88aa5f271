"""Fine-tune upcycled models with Bridge's own `finetune`, with all weights or with LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.utils.checkpoint_utils import checkpoint_exists

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.balancing import bias_fields
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.aux_loss import correct_losses
from nemo_upcycle.trainers.bridge.chat import check_balancing
from nemo_upcycle.trainers.bridge.models import upcycled_provider
from nemo_upcycle.trainers.bridge.run_folder import RECEIPT, load_receipt


def finetune_from(config: ConfigContainer, run: str | Path, **changes: Any) -> None:
    """Let a fine-tuning start from the newest checkpoint of an upcycled run, or of its dense baseline.

    The configuration gets the model that the run's spec describes, with the parent's vocabulary size. Bridge's recipes
    would use the padded size of the tokenizer's vocabulary, and the run's checkpoint has no rows for the padding.
    Biases that balance the experts are kept, and the fine-tuning continues to adjust these biases. The parent's
    `config.json` must still be at its original place.

    Args:
        config: configuration of the fine-tuning; changed in place. Its data set defines the sequence length.
        run: folder of the run's checkpoints, with its `receipt.json`.
        changes: fields of the model's provider that are to differ: layout, precision, kernels.

    Raises:
        UpcycleError: the run was not upcycled, or has no checkpoint.
        SpecError: `seq_aux_loss` is set, which would count tokens that pad a sequence.

    Example:
        >>> finetune_from(config, "/runs/mine", expert_model_parallel_size=8)  # doctest: +SKIP
        >>> finetune(config, forward_step)  # doctest: +SKIP
    """
    receipt, has_checkpoint = load_receipt(str(run)), checkpoint_exists(str(run))
    if receipt is None or not has_checkpoint:
        raise UpcycleError(
            str(run),
            kind="missing",
            got="has no checkpoint" if receipt else f"has no {RECEIPT}",
            fix="give the folder that config.checkpoint.save of an upcycled run names",
        )
    spec = UpcycleSpec(**receipt["spec"]) if receipt["spec"] else None
    kept = bias_fields(receipt.get("balancing_bias", {}))
    changes = {"seq_length": config.dataset.seq_length, "perform_initialization": False} | kept | changes
    config.model = upcycled_provider(receipt["source"], spec, **changes)
    check_balancing(config.model)
    config.model.register_pre_wrap_hook(_let_losses_act)
    config.tokenizer.use_tokenizer_vocab_size = False
    config.checkpoint.pretrained_checkpoint = str(run)


def _let_losses_act(chunks: list[Any]) -> list[Any]:
    """Make auxiliary losses act with their coefficients, as in the upcycled run."""
    correct_losses(chunks[0].config)
    return chunks
