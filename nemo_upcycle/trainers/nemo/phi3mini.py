"""Phi-3.5 and Phi-4-mini in NeMo: its Phi-3, with LongRoPE and heads that are rotated in part."""

# No postponed annotations, and Optional: NeMo-Run parses settings of the model by them.

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nemo_run as run
from nemo.collections.llm.gpt.model.phi3mini import Phi3Config, Phi3Model

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.rotary import LONGROPE, turn_as


@dataclass
class LongRopePhi3Config(Phi3Config):
    """NeMo's configuration of a Phi-3 with LongRoPE; its sequences have the frequencies of their length.

    Args:
        short_factor: factors on rotary frequencies, for sequences up to `original_max_position_embeddings`.
        long_factor: factors for longer sequences.
        original_max_position_embeddings: number of tokens.
        max_position_embeddings: number of tokens; with the former it decides the factor on sine and cosine.
    """

    short_factor: list[float] = field(default_factory=list)
    long_factor: list[float] = field(default_factory=list)
    original_max_position_embeddings: int = 4096
    max_position_embeddings: int = 131072
    apply_rope_fusion: bool = False  # whose kernel has no factor on sine and cosine

    def configure_model(
        self,
        tokenizer: Any,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> Any:
        """Return Megatron's model with LongRoPE's frequencies."""
        model = super().configure_model(tokenizer, pre_process, post_process, vp_stage)
        turn_as(model, self._rotary())
        return model

    def _rotary(self) -> Architecture:
        scaling = {"rope_type": LONGROPE, "short_factor": self.short_factor, "long_factor": self.long_factor}
        return Architecture(
            hf_class="",
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_size=self.ffn_hidden_size,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_query_groups or self.num_attention_heads,
            head_dim=self.kv_channels or self.hidden_size // self.num_attention_heads,
            vocab_size=self.vocab_size or 0,
            tied_embeddings=self.share_embeddings_and_output_weights,
            rope_theta=self.rotary_base,
            rope_scaling=scaling | {"original_max_position_embeddings": self.original_max_position_embeddings},
            rotary_percent=self.rotary_percent,
            max_positions=self.max_position_embeddings,
        )


def phi3_model(dense: str, seq_length: int = 4096) -> run.Config[Phi3Model]:
    """Return NeMo's model of a Phi-3, 3.5 or 4-mini, for a recipe of yours.

    Args:
        dense: its Hugging Face folder.
        seq_length: length of the sequences to train on.

    Example:
        >>> recipe.model = phi3_model("/models/Phi-4-mini-instruct")  # doctest: +SKIP
    """
    arch = read_architecture(Path(dense))
    scaling = dict(arch.rope_scaling or {})
    is_long = scaling.pop("rope_type", "") == LONGROPE
    config = run.Config(
        LongRopePhi3Config if is_long else Phi3Config,
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_size,
        num_attention_heads=arch.num_heads,
        num_query_groups=arch.num_kv_heads,
        kv_channels=arch.head_dim,
        layernorm_epsilon=arch.norm_eps,
        rotary_base=arch.rope_theta,
        rotary_percent=arch.rotary_percent,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        window_size=(arch.sliding_window - 1, 0) if arch.sliding_window else None,
        seq_length=seq_length,
        vocab_size=arch.vocab_size,
        **(scaling | {"max_position_embeddings": arch.max_positions} if is_long else {}),
    )
    return run.Config(Phi3Model, config=config)
