"""NeMo's data module, which checks a finished folder of `nemo-upcycle data` and reads it epoch by epoch."""

# NeMo-Run parses `data.seq_length=1024` by the annotations: do not postpone them, and write Optional.

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Optional, Union

import torch
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer
from nemo.collections.llm.gpt.data import MockDataModule, PreTrainingDataModule
from torch.utils.data import Subset

from nemo_upcycle.data.blend import DEMO
from nemo_upcycle.data.blend_samples import (
    clamp_interval,
    describe_blend,
    index_folder,
    log_tokens_read,
    require_few_epochs,
    whole_indices,
)
from nemo_upcycle.data.build import cached_blend
from nemo_upcycle.data.chat_module import PackedChatModule
from nemo_upcycle.data.epoch_dataset import EpochDataset
from nemo_upcycle.data.finished import MANIFEST, TOKENIZER, FinishedBlend, open_blend
from nemo_upcycle.data.skipped_samples import SkippedSamples
from nemo_upcycle.sources.fetch import read_parent
from nemo_upcycle.sources.find import Parent


def blend_data(  # noqa: PLR0913 - started runs name its arguments
    dense: str,
    folder: Optional[str] = None,  # noqa: UP045
    blend: Optional[str] = None,  # noqa: UP045
    seq_length: int = 8192,
    micro_batch_size: int = 1,
    global_batch_size: int = 512,
    num_workers: int = 8,
    seed: Optional[int] = None,  # noqa: UP045
    indices: Optional[str] = None,  # noqa: UP045
    skip_samples: Optional[int] = None,  # noqa: UP045
    skipped: Optional[list[list[int]]] = None,  # noqa: UP045
) -> "BlendDataModule":
    """Return NeMo's pretraining data module over a finished folder of `nemo-upcycle data`.

    The order of the samples depends on the folder, `seq_length` and `seed`. Batch sizes and `trainer.max_steps` do not
    change it, so a longer run and the dense baseline see the same first samples. Each source is read epoch by epoch
    (see `EpochDataset`).

    Args:
        dense: dense model that training starts from; the data must have its tokenizer.
        folder: finished data folder; all nodes must share it.
        blend: blend to build once in the cache if no folder is given: a name in `conf/data`, or a YAML file.
        seq_length: tokens in a sequence.
        micro_batch_size: sequences in a micro batch.
        global_batch_size: sequences in a step, over all ranks.
        num_workers: data-loading processes per rank.
        seed: seed of the sequence order; None uses the seed in the manifest.
        indices: folder into which the first rank writes the order of the samples. All nodes must share it, and several
            blends may use it. None means `indices` in the data folder.
        skip_samples: sequences to skip at the start of the order. The starting model was already trained on these
            sequences, with the same seed.
        skipped: ranges of sequences that a rewound run leaves out, counted after `skip_samples`; see `SkippedSamples`.

    Raises:
        UpcycleError: the folder is unfinished, damaged or made with another tokenizer, or a split is shorter than one
            sequence.

    Example:
        >>> recipe.data = run.Config(blend_data, dense="/models/Llama-3-8B", folder="data/mine")  # doctest: +SKIP
    """
    finished = open_blend(folder if folder is not None else cached_blend(blend or "", dense))
    finished.require_tokenizer_of(dense)
    module = BlendDataModule(
        paths=finished.paths(seq_length),
        split=None,  # the three paths define the splits; NeMo warns about any other value
        # NeMo copies this whole folder into every checkpoint. The dense model's folder would add all weights.
        tokenizer=AutoTokenizer(pretrained_model_name=str(finished.folder / TOKENIZER)),
        index_mapping_dir=str(index_folder(finished, indices)),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        num_workers=num_workers,
        seed=finished.manifest["seed"] if seed is None else seed,
        pin_memory=torch.cuda.is_available(),
    )
    module.skip_samples, module.reads_demo = skip_samples or 0, folder is None and blend == DEMO
    module.skipped = SkippedSamples.of(skipped or ())
    return module


class BlendDataModule(PreTrainingDataModule):
    """The data module that `blend_data` returns: it reads epoch by epoch, and rebuilds damaged index files."""

    skip_samples = 0
    skipped = SkippedSamples()
    reads_demo = False
    _train_ds: Any  # set by NeMo

    @property
    def blend(self) -> FinishedBlend:
        """Open the data folder again, because a checkpoint stores only NeMo's own arguments."""
        (first, *_), _ = self.build_kwargs["blend_per_split"][0]
        return open_blend(Path(first).parents[1])

    def setup(self, stage: str = "") -> None:
        """Set up as NeMo does, but first lower a validation interval that is longer than the run."""
        clamp_interval(self.trainer)
        super().setup(stage)

    def build(
        self,
        trainer_max_steps: int,
        trainer_val_check_interval: int,
        trainer_limit_val_batches: Union[int, float],  # noqa: UP007
        trainer_limit_test_batches: Union[int, float],  # noqa: UP007
    ) -> None:
        """Build the datasets as NeMo does, and log on the first rank how many tokens the run reads.

        Every validation starts at the beginning of the validation data, so only the samples of one validation are
        prepared. An integer `limit_val_batches` is the number of batches in a validation, whatever the length of the
        run. If `limit_val_batches` is the fraction 1.0, a validation reads each token once.
        """
        blend = self.blend
        step_tokens = self.global_batch_size * self.seq_length
        steps = trainer_max_steps + 1  # a finished run may be started again, and then needs samples
        if self.reads_demo:
            require_few_epochs(blend, trainer_max_steps * step_tokens)
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        if first:
            log_tokens_read(blend, trainer_max_steps, step_tokens, self.skip_samples * self.seq_length)
        if isinstance(trainer_limit_val_batches, float):
            prefixes, _ = self.build_kwargs["blend_per_split"][1]
            self.build_kwargs["blend_per_split"][1] = (prefixes, None)  # whole epochs require data without weights
        steps += -(-(self.skip_samples + self.skipped.count) // self.global_batch_size)
        cache = whole_indices(Path(self.index_mapping_dir), blend.folder / MANIFEST) if first else nullcontext()
        with cache:
            self.dataset_cls = EpochDataset
            super().build(steps, steps + 1, trainer_limit_val_batches, trainer_limit_test_batches)  # one validation
        if self.skip_samples:
            self._train_ds = Subset(self._train_ds, range(self.skip_samples, len(self._train_ds)))
        self._train_ds = self.skipped.left_in(self._train_ds)


def mock_tokenizer(dense: str) -> NullTokenizer:
    """Return a tokenizer for NeMo's mock data (random tokens) with the vocabulary size of a dense model.

    Args:
        dense: dense model, as in `UpcycleConfig.path`; only its configuration and tokenizer are fetched from the hub.
    """
    return NullTokenizer(vocab_size=read_parent(Parent(dense)).vocab_size - 1)  # the last id ends a document


def describe_data(datamodule: Any) -> str:
    """Describe a run's data in a few words, for its report."""
    if isinstance(datamodule, MockDataModule):
        return "NeMo's mock data (random tokens)"
    if isinstance(datamodule, BlendDataModule):
        return describe_blend(datamodule.blend)
    if isinstance(datamodule, PackedChatModule):
        return datamodule.chat.card
    return type(datamodule).__name__
