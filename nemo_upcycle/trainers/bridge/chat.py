"""Tune in Megatron-Bridge on a finished folder of `nemo-upcycle chat`: Bridge's own packs, in the order of NeMo's."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider
from megatron.bridge.data.packing.config import PackedSequenceSpecs
from megatron.bridge.data.packing.gpt_sft import GPTSFTPackedDataset
from megatron.core.num_microbatches_calculator import get_current_global_batch_size

from nemo_upcycle.data.chat.finished import PACKS, FinishedChat, open_chat
from nemo_upcycle.data.finished import TOKENIZER
from nemo_upcycle.data.tokenizers import open_tokenizer
from nemo_upcycle.errors import SpecError
from nemo_upcycle.trainers.bridge.blend import Repeated
from nemo_upcycle.utils.progress import show_messages


@dataclass(kw_only=True)
class ChatDataset(DatasetProvider):
    """The data of a tuning: Bridge's `config.dataset`.

    A sample is a pack of conversations that do not see each other; the loss is on their answers. The packs are read
    epoch by epoch, each in another order that depends on `seed` alone: a longer run, the dense baseline, and the
    tuning in NeMo see the same first samples. Every validation reads the same packs, those that were held back for it.

    Args:
        folder: a finished folder of `nemo-upcycle chat`; all nodes must share it.
        seq_length: places of a pack; must be the folder's.
        seed: seed of the order of the packs; None takes the manifest's.

    Example:
        >>> config.dataset = ChatDataset(folder="data/mine", seq_length=4096)  # doctest: +SKIP
    """

    folder: str
    seq_length: int
    seed: int | None = None
    dataloader_type: Any = "single"
    #: Bridge looks for both: stages in the middle of a pipeline get the borders of the conversations, too.
    enable_offline_packing: bool = True
    pad_to_max_length: bool = True

    @property
    def offline_packing_specs(self) -> PackedSequenceSpecs:
        """The length of the packs, where Bridge looks for it."""
        return PackedSequenceSpecs(packed_sequence_size=self.seq_length)

    @property
    def chat(self) -> FinishedChat:
        """Read the folder again.

        Raises:
            UpcycleError: it is not finished, or damaged.
        """
        return open_chat(self.folder)

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, None]:
        """Return the packs to train and, if any are wanted, to validate on; the first rank says what is read.

        Raises:
            UpcycleError: the folder is not finished, damaged or of another length.
        """
        chat, batch = self.chat, get_current_global_batch_size()
        chat.require_length(self.seq_length)
        if torch.distributed.get_rank() == 0:
            show_messages().info("%s", chat.describe(context.train_samples // batch, batch))
        # A step more than the run has: one that is finished may start again, and finds samples.
        train = _packs(chat, "train", self.seed, context.train_samples + batch)
        once = context.test_samples  # of one validation, as of one test
        if not once:
            return train, None, None
        packs = _packs(chat, "validation", self.seed)
        return train, _RepeatedPacks(packs, once, max(once, context.valid_samples)), None


class _Packs(GPTSFTPackedDataset):
    """Bridge's packs, with a loss on every token of an answer."""

    def collate_fn(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        """Return packs as a batch; Bridge takes the loss from all that follows an end of text."""
        made: dict[str, Any] = super().collate_fn(batch)
        masks = [self._build_loss_mask(pack) for pack in batch]
        made["loss_mask"] = torch.tensor(self._collate_item(masks, max_length=self.max_seq_length, pad_id=0))
        return made


def _packs(chat: FinishedChat, split: str, seed: int | None, samples: int | None = None) -> _Packs:
    padding = open_tokenizer(chat.folder / TOKENIZER).eos_token_id
    return _Packs(
        str(chat.folder / PACKS[split]),
        SimpleNamespace(eos_id=padding),  # all that packs ask of a tokenizer
        max_seq_length=chat.manifest["seq_length"],
        pad_to_max_length=True,
        prompt_template="{answer}",  # not used, and looked for
        truncation_field=None,
        seed=chat.manifest["seed"] if seed is None else seed,
        max_num_samples=samples,
    )


class _RepeatedPacks(Repeated):
    """Packs, and behind them packs without a loss, up to a whole number of batches; over and over."""

    def __init__(self, packs: _Packs, once: int, total: int) -> None:
        super().__init__(packs, once, total)
        self.collate_fn = packs.collate_fn

    def __getitem__(self, index: int) -> Any:
        number = index % self._once
        return self._dataset[number if number < len(self._dataset) else -1]  # Bridge's packs have no loss below zero


def check_balancing(model: Any) -> None:
    """Check that no loss of routers counts the tokens that pad a sequence or a pack.

    Raises:
        SpecError: one does.
    """
    if "seq_aux_loss" in (kinds := model.moe_router_load_balancing_type):  # a name, or a list of them
        raise SpecError(
            field="config.model.moe_router_load_balancing_type",
            kind="refused",
            got=f"cannot be {kinds}: Bridge gives routers no mask for the tokens that pad a sequence",
            fix="set it to aux_loss or none",
        )
