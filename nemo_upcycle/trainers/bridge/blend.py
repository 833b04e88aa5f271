"""Train in Megatron-Bridge on a finished folder of `nemo-upcycle data`, epoch by epoch."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.num_microbatches_calculator import get_current_global_batch_size

from nemo_upcycle.data.blend_samples import index_folder, log_tokens_read, whole_indices
from nemo_upcycle.data.epoch_dataset import EpochDataset, dataset_config
from nemo_upcycle.data.finished import MANIFEST, open_blend
from nemo_upcycle.data.skipped_samples import SkippedSamples


@dataclass(kw_only=True)
class BlendDataset(DatasetProvider):
    """The data of a run, for Bridge's `config.dataset`.

    The order of the samples depends on the folder, `seq_length` and `seed`, but not on batch sizes or the number of
    steps. Therefore a longer run and the dense baseline see the same first samples, as in NeMo. Each source is read
    epoch by epoch; see `EpochDataset`. Every validation reads the same sequences.

    Args:
        folder: a finished folder of `nemo-upcycle data`; all nodes must share it.
        seq_length: sequence length (tokens).
        seed: seed of the order of the sequences; None: the manifest's seed.
        indices: folder, shared by all nodes, in which the first rank writes the order of the samples; None: `indices`
            in the data folder.
        skipped: ranges of sequences that a rewound run leaves out; see `SkippedSamples`.

    Example:
        >>> config.dataset = BlendDataset(folder="data/mine", seq_length=8192)  # doctest: +SKIP
    """

    folder: str
    seq_length: int
    seed: int | None = None
    indices: str | None = None
    skipped: list[list[int]] = field(default_factory=list)
    dataloader_type: Any = "single"

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, None]:
        """Return the training sequences and, if requested, validation sequences; the first rank logs the token count.

        Raises:
            UpcycleError: the folder is unfinished or damaged, or a split is shorter than one sequence.
        """
        blend = open_blend(self.folder)
        paths = blend.paths(self.seq_length)
        batch = get_current_global_batch_size()
        once = context.test_samples  # a validation has as many samples as a test
        cache = index_folder(blend, self.indices)
        config = dataset_config(
            paths["train"],
            paths["validation"] if once else None,
            seq_length=self.seq_length,
            seed=blend.manifest["seed"] if self.seed is None else self.seed,
            tokenizer=context.tokenizer,
            cache=cache,
        )
        # Build samples for one more step, because a finished run that is started again must find samples.
        skipped = SkippedSamples.of(self.skipped)
        wanted = [context.train_samples + batch + skipped.count, once or None, None]
        builder = BlendedMegatronDatasetBuilder(EpochDataset, wanted, lambda: True, config)
        first = torch.distributed.get_rank() == 0
        if first:
            log_tokens_read(blend, context.train_samples // batch, batch * self.seq_length)
        with whole_indices(cache, blend.folder / MANIFEST) if first else nullcontext():
            train, validation, _ = builder.build()
        repeated = Repeated(validation, once, max(once, context.valid_samples)) if once else None
        return skipped.left_in(train), repeated, None


class Repeated(torch.utils.data.Dataset[Any]):
    """Repeats the first sequences of a dataset, because Bridge continues reading where the last validation ended.

    Args:
        dataset: dataset to repeat.
        once: number of sequences in one repetition.
        total: number of sequences in all repetitions.
    """

    def __init__(self, dataset: Any, once: int, total: int) -> None:
        self._dataset, self._once, self._total = dataset, once, total

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, index: int) -> Any:
        return self._dataset[index % self._once]
