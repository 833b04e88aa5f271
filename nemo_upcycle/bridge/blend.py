"""Train in Megatron-Bridge on a finished folder of `nemo-upcycle data`, with its order pinned."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import get_blend_from_list

from nemo_upcycle.data.blend_samples import BRIDGE_SETTINGS, INDICES, require_samples, say_what_is_read
from nemo_upcycle.data.finished import MANIFEST, open_blend
from nemo_upcycle.data.index_cache import whole_indices


@dataclass(kw_only=True)
class BlendDataset(DatasetProvider):
    """What a run reads: `config.dataset` of Bridge's.

    The order of the samples depends on the folder, `seq_length`, `seed` and `run_tokens`, and on neither batch sizes
    nor the number of steps: a longer run, and the dense baseline, see the same first samples, as in NeMo.

    Args:
        folder: the folder; all nodes must share it.
        seq_length: tokens of a sequence.
        global_batch_size: sequences of a step.
        seed: of the order of the sequences; None takes the manifest's.
        run_tokens: tokens of the longest run that shall have this order; None takes the manifest's, or each token of
            the data once.

    Example:
        >>> config.dataset = BlendDataset(folder="data/mine", seq_length=8192, global_batch_size=512)  # doctest: +SKIP
    """

    folder: str
    seq_length: int
    global_batch_size: int
    seed: int | None = None
    run_tokens: int | None = None
    dataloader_type: Any = "single"

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, None]:
        """Return the sequences to train and, if any are wanted, to validate on; the first rank says what is read.

        Raises:
            UpcycleError: the folder is not finished or damaged, a split is shorter than one sequence, or the run is
                longer than its order of samples.
        """
        blend = open_blend(self.folder)
        paths = blend.paths(self.seq_length)
        samples = blend.num_train_samples(self.seq_length, self.run_tokens)
        steps = context.train_samples // self.global_batch_size
        require_samples(steps, self.global_batch_size, self.seq_length, samples, BRIDGE_SETTINGS)
        validates = context.valid_samples > 0
        config = GPTDatasetConfig(
            random_seed=blend.manifest["seed"] if self.seed is None else self.seed,
            sequence_length=self.seq_length,
            blend_per_split=[
                get_blend_from_list(paths["train"]),
                get_blend_from_list(paths["validation"]) if validates else None,
                None,
            ],
            path_to_cache=str(blend.folder / INDICES),
            tokenizer=context.tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,  # attention is causal
        )
        wanted = [samples, context.valid_samples if validates else None, None]
        builder = BlendedMegatronDatasetBuilder(GPTDataset, wanted, lambda: True, config)
        first = torch.distributed.get_rank() == 0
        if first:
            say_what_is_read(blend, steps, self.global_batch_size * self.seq_length)
        with whole_indices(blend.folder / INDICES, blend.folder / MANIFEST) if first else nullcontext():
            train, validation, _ = builder.build()
        return train, validation, None
