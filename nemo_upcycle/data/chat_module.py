"""NeMo's data module for fine-tuning over a finished folder of `nemo-upcycle chat`, which is checked first."""

# NeMo-Run parses `data.seq_length=4096` by the annotations: do not postpone them, and write Optional.

from typing import Any, Optional

import torch
from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
from nemo.collections.llm.gpt.data.fine_tuning import FineTuningDataModule
from nemo.collections.llm.gpt.data.packed_sequence import PackedSequenceSpecs
from torch.utils.data import DataLoader, Dataset

from nemo_upcycle.data.blend_samples import clamp_interval
from nemo_upcycle.data.chat.build_chat import cached_chat
from nemo_upcycle.data.chat.finished import PACKING, PACKS, FinishedChat, open_chat
from nemo_upcycle.data.finished import TOKENIZER
from nemo_upcycle.data.skipped_samples import SkippedSamples
from nemo_upcycle.utils.progress import show_messages
from nemo_upcycle.utils.ranks import is_first_rank


def chat_data(  # noqa: PLR0913 - started runs name its arguments
    dense: str,
    folder: Optional[str] = None,  # noqa: UP045
    chat: Optional[str] = None,  # noqa: UP045
    seq_length: int = 2048,
    micro_batch_size: int = 1,
    global_batch_size: int = 128,
    num_workers: int = 8,
    seed: Optional[int] = None,  # noqa: UP045
    skipped: Optional[list[list[int]]] = None,  # noqa: UP045
) -> "PackedChatModule":
    """Return NeMo's data module for fine-tuning over a finished folder of `nemo-upcycle chat`.

    A sample is a pack of conversations that do not attend to each other. The loss covers their answers. The packs are
    read epoch by epoch. Each epoch has its own order, which depends only on `seed`, so a longer run and the dense
    baseline see the same first samples.

    Args:
        dense: dense model that training starts from; the data must have its tokenizer.
        folder: finished data folder; all nodes must share it.
        chat: conversations to pack once in the cache if no folder is given: a name in `conf/chat`, a YAML file, or a
            file of JSON lines.
        seq_length: token positions in a pack; must match the data folder.
        micro_batch_size: packs in a micro batch; NeMo accepts only 1.
        global_batch_size: packs in a step, over all ranks.
        num_workers: data-loading processes per rank.
        seed: seed of the order of the packs; None uses the seed in the manifest.
        skipped: ranges of packs that a rewound run leaves out; see `SkippedSamples`.

    Raises:
        UpcycleError: the folder is unfinished, damaged, has packs of another length, or was made with another
            tokenizer.

    Example:
        >>> recipe.data = run.Config(chat_data, dense="/models/Llama-3-8B", folder="data/mine")  # doctest: +SKIP
    """
    finished = open_chat(folder if folder is not None else cached_chat(chat or "", dense, seq_length))
    finished.require_tokenizer_of(dense)
    finished.require_length(seq_length)
    train, validation = (str(finished.folder / name) for name in PACKS.values())
    specs = PackedSequenceSpecs(
        packed_sequence_size=seq_length,
        packed_train_data_path=train,
        packed_val_data_path=validation,
        packed_metadata_path=str(finished.folder / PACKING),
    )
    module = PackedChatModule(
        dataset_root=str(finished.folder),
        seq_length=seq_length,
        tokenizer=AutoTokenizer(pretrained_model_name=str(finished.folder / TOKENIZER)),
        micro_batch_size=micro_batch_size,
        global_batch_size=global_batch_size,
        seed=finished.manifest["seed"] if seed is None else seed,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        packed_sequence_specs=specs,
        dataset_kwargs={"pad_to_max_length": True},  # pipeline stages and FP8 need packs of one length
    )
    module.skipped = SkippedSamples.of(skipped or ())
    return module


class PackedChatModule(FineTuningDataModule):
    """The data module that `chat_data` returns. Resumed runs continue at the next pack. Validation uses all packs."""

    skipped = SkippedSamples()

    @property
    def chat(self) -> FinishedChat:
        """Open the data folder again."""
        return open_chat(self.dataset_root)

    def setup(self, stage: str) -> None:
        """Set up as NeMo does, but with twice as many packs; log on the first rank how much the run reads.

        A resumed run counts its steps from the start of the run, but its packs from the last checkpoint. With NeMo's
        own number of packs, the resumed run would end the epoch too early, and would then read the packs after the
        checkpoint again.
        """
        clamp_interval(self.trainer)
        super().setup(stage)
        self.max_train_samples = (2 * self.trainer.max_steps + 1) * self.global_batch_size + self.skipped.count
        if is_first_rank():
            show_messages().info("%s", self.chat.describe(self.trainer.max_steps, self.global_batch_size))

    def _create_dataloader(self, dataset: Any, mode: str, **kwargs: Any) -> Any:
        packs = self.skipped.left_in(dataset) if mode == "train" else dataset
        return super()._create_dataloader(packs, mode, **kwargs)

    def val_dataloader(self) -> DataLoader:
        """Return the validation packs, filled up to whole batches, because NeMo drops an incomplete batch."""
        packs = self._create_dataset(
            self.validation_path_packed, pack_metadata_path=self.pack_metadata, is_test=True, **self.dataset_kwargs
        )
        return self._create_dataloader(_WholeBatches(packs, self.global_batch_size), mode="validation")


class _WholeBatches(Dataset):
    """Packs, followed by packs that complete the last batch and have no loss."""

    def __init__(self, packs: Any, batch: int) -> None:
        self.packs, self.batch, self.collate_fn = packs, batch, packs.collate_fn

    def __len__(self) -> int:
        return -(-len(self.packs) // self.batch) * self.batch

    def __getitem__(self, number: int) -> Any:
        there = len(self.packs)
        return self.packs[number if number < there else -1 - number % there]  # NeMo masks the loss at negative indices
