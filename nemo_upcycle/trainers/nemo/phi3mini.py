"""Phi-3.5 and Phi-4-mini for NeMo: NeMo's Phi-3 with LongRoPE and partially rotated heads."""

# Do not postpone annotations here, and use Optional: NeMo-Run needs annotations to parse settings of the model.

from dataclasses import dataclass, field, replace
from typing import Any

from nemo.collections.llm.gpt.model.phi3mini import Phi3Config

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.megatron_config import architecture_of
from nemo_upcycle.models.rotary import LONGROPE, turn_as


@dataclass
class LongRopePhi3Config(Phi3Config):
    """NeMo's configuration of a Phi-3 with LongRoPE; the frequencies depend on the sequence length.

    Args:
        short_factor: factors on the rotary frequencies, for sequences up to `original_max_position_embeddings`.
        long_factor: factors on the rotary frequencies, for longer sequences.
        original_max_position_embeddings: longest sequence that uses `short_factor` (tokens).
        max_position_embeddings: longest sequence of the model (tokens). Together with
            `original_max_position_embeddings` it determines the factor on sine and cosine.
    """

    short_factor: list[float] = field(default_factory=list)
    long_factor: list[float] = field(default_factory=list)
    original_max_position_embeddings: int = 4096
    max_position_embeddings: int = 131072
    apply_rope_fusion: bool = False  # the fused kernel has no factor on sine and cosine

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
        return replace(
            architecture_of(self, 0),
            rope_theta=self.rotary_base,
            rope_scaling=scaling | {"original_max_position_embeddings": self.original_max_position_embeddings},
            max_positions=self.max_position_embeddings,
        )
