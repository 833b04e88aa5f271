"""Tune in Megatron-Bridge on a finished folder of `nemo-upcycle chat`, with Bridge's own packs in NeMo's order."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from megatron.bridge.data.base import DatasetBuildContext, DatasetProvider
from megatron.bridge.data.packing.config import PackedSequenceSpecs
from megatron.bridge.data.packing.gpt_sft import GPTSFTPackedDataset
from megatron.core.num_microbatches_calculator import get_current_global_batch_size

from nemo_upcycle.data.chat.finished import PACKS, FinishedChat, open_chat
from nemo_upcycle.data.finished import TOKENIZER
from nemo_upcycle.data.skipped_samples import SkippedSamples
from nemo_upcycle.data.tokenizers import open_tokenizer
from nemo_upcycle.errors import SpecError
from nemo_upcycle.trainers.bridge.blend import Repeated
from nemo_upcycle.utils.progress import show_messages


@dataclass(kw_only=True)
class ChatDataset(DatasetProvider):
    """The data of a tuning, for Bridge's `config.dataset`.

    A sample is a pack of conversations that do not see each other, with a loss on their answers. The packs are read
    epoch by epoch. Each epoch has a different order, which depends only on `seed`. Therefore a longer run, the dense
    baseline, and a tuning in NeMo see the same first samples. Every validation reads the same packs, which are not
    used for training.

    Args:
        folder: a finished folder of `nemo-upcycle chat`; all nodes must share it.
        seq_length: length of a pack (tokens); must match the folder.
        seed: seed of the order of the packs; None: the manifest's seed.
        skipped: ranges of packs that a rewound run leaves out; see `SkippedSamples`.

    Example:
        >>> config.dataset = ChatDataset(folder="data/mine", seq_length=4096)  # doctest: +SKIP
    """

    folder: str
    seq_length: int
    seed: int | None = None
    skipped: list[list[int]] = field(default_factory=list)
    dataloader_type: Any = "single"
    #: With these two fields, Bridge passes the borders of the conversations to middle pipeline stages, too.
    enable_offline_packing: bool = True
    pad_to_max_length: bool = True

    @property
    def offline_packing_specs(self) -> PackedSequenceSpecs:
        """The length of the packs, in the attribute that Bridge reads."""
        return PackedSequenceSpecs(packed_sequence_size=self.seq_length)

    @property
    def chat(self) -> FinishedChat:
        """The contents of the folder, which is read again at every access.

        Raises:
            UpcycleError: the folder is not finished, or damaged.
        """
        return open_chat(self.folder)

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, None]:
        """Return the training packs and, if requested, the validation packs; the first rank logs a description.

        Raises:
            UpcycleError: the folder is unfinished, damaged, or made for another length.
        """
        chat, batch = self.chat, get_current_global_batch_size()
        chat.require_length(self.seq_length)
        if torch.distributed.get_rank() == 0:
            show_messages().info("%s", chat.describe(context.train_samples // batch, batch))
        # Build samples for one more step, because a finished run that is started again must find samples.
        skipped = SkippedSamples.of(self.skipped)
        packs = _packs(chat, "train", self.seed, context.train_samples + batch + skipped.count)
        train = skipped.left_in(packs)
        once = context.test_samples  # a validation has as many samples as a test
        if not once:
            return train, None, None
        validation = _packs(chat, "validation", self.seed)
        return train, _RepeatedPacks(validation, once, max(once, context.valid_samples)), None


class _Packs(GPTSFTPackedDataset):
    """Bridge's packs, with a loss on every token of an answer."""

    def collate_fn(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        """Return packs as a batch, with the whole loss mask, because Bridge drops the loss after an end of text."""
        made: dict[str, Any] = super().collate_fn(batch)
        masks = [self._build_loss_mask(pack) for pack in batch]
        made["loss_mask"] = torch.tensor(self._collate_item(masks, max_length=self.max_seq_length, pad_id=0))
        return made


def _packs(chat: FinishedChat, split: str, seed: int | None, samples: int | None = None) -> _Packs:
    padding = open_tokenizer(chat.folder / TOKENIZER).eos_token_id
    return _Packs(
        str(chat.folder / PACKS[split]),
        SimpleNamespace(eos_id=padding),  # packs need nothing else from a tokenizer
        max_seq_length=chat.manifest["seq_length"],
        pad_to_max_length=True,
        prompt_template="{answer}",  # unused, but Bridge looks for it
        truncation_field=None,
        seed=chat.manifest["seed"] if seed is None else seed,
        max_num_samples=samples,
    )


class _RepeatedPacks(Repeated):
    """Repeats packs; packs without a loss fill the last batch of each repetition."""

    def __init__(self, packs: _Packs, once: int, total: int) -> None:
        super().__init__(packs, once, total)
        self.collate_fn = packs.collate_fn

    def __getitem__(self, index: int) -> Any:
        number = index % self._once
        return self._dataset[number if number < len(self._dataset) else -1]  # Bridge gives negative indices no loss


def check_balancing(model: Any) -> None:
    """Check that no router loss counts the tokens that pad a sequence or a pack.

    Raises:
        SpecError: `seq_aux_loss` is set, which counts these tokens.
    """
    if "seq_aux_loss" in (kinds := model.moe_router_load_balancing_type):  # one name or a list of names
        raise SpecError(
            field="config.model.moe_router_load_balancing_type",
            kind="refused",
            got=f"cannot be {kinds}: Bridge gives routers no mask for the tokens that pad a sequence",
            fix="set it to aux_loss or none",
        )
