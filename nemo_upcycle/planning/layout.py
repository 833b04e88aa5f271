"""The division of a model over a cluster: parallel sizes, and the layers of each pipeline stage.

Ranks are ordered as in Megatron-Core, without its code: tp changes fastest, then cp, dp and pp. For experts, etp
changes fastest, then ep, expert dp and pp. `rules.py` checks a layout.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, fields
from typing import NamedTuple

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.architecture import Architecture


#: NeMo pads the vocabulary to a multiple of this number times TP (`make_vocab_size_divisible_by`).
VOCABULARY_MULTIPLE = 128
#: Largest number of ranks that a training without GPUs may have.
CPU_RANKS = 2


class Chunk(NamedTuple):
    """The part of the model that one virtual stage of a pipeline stage holds: layers, embedding, output layer."""

    layers: range
    has_embedding: bool
    has_output: bool


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The parallel sizes of a training.

    Args:
        gpus: number of ranks.
        tp: tensor parallelism of everything except the routed experts; if it is above 1, sequence parallelism is on,
            because MoE needs sequence parallelism.
        pp: pipeline stages.
        vp: virtual stages (chunks) of each pipeline stage; 1 without interleaving.
        cp: context parallelism.
        ep: expert parallelism.
        etp: tensor parallelism of the routed experts, which may differ from tp.
        micro_batch: sequences of one micro-batch.
        first: layers of the first pipeline stage, if they are set separately (`num_layers_in_first_pipeline_stage`).
        last: layers of the last pipeline stage, if they are set separately.
        embedding: 1 if the embedding counts as a layer when layers are divided (`account_for_embedding_in_...`).
        loss: 1 if the output layer counts as a layer (`account_for_loss_in_pipeline_split`).

    Example:
        >>> Layout(gpus=128, tp=2, pp=4, vp=8, cp=2, ep=8).dp
        8
    """

    gpus: int
    tp: int = 1
    pp: int = 1
    vp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    micro_batch: int = 1
    first: int | None = None
    last: int | None = None
    embedding: int = 0
    loss: int = 0

    @property
    def takes_packs(self) -> bool:
        """Whether training on packed conversations can use the layout. A micro-batch must be one whole pack."""
        return self.micro_batch == self.cp == 1

    @property
    def sizes(self) -> str:
        """The sizes that are not 1, as text for `--layout`, without dp, which follows from the other sizes."""
        names = [name for name in ("tp", "pp", "vp", "cp", "ep") if getattr(self, name) > 1]
        names += ["etp"] if self.etp > 1 and self.ep > 1 else []  # with ep=1, etp equals tp
        names += [name for name in ("first", "last", "embedding", "loss") if getattr(self, name)]
        return "".join(f"{name}={getattr(self, name)}," for name in names) + f"mbs={self.micro_batch}"

    def __str__(self) -> str:
        return self.sizes.replace("mbs=", f"dp={self.dp},mbs=")

    @property
    def dp(self) -> int:
        """Number of copies of the dense part, each with its own data."""
        return self.gpus // (self.tp * self.cp * self.pp)

    @property
    def expert_dp(self) -> int:
        """Number of copies of every routed expert."""
        return self.gpus // (self.etp * self.ep * self.pp)

    @property
    def dense_shards(self) -> int:
        """Number of ranks (dp x cp) that share the optimizer states of the dense part."""
        return self.dp * self.cp

    def node_gpus(self, per_node: int) -> int:
        """Return the largest number of GPUs per node that divides the job evenly and splits no tensor-parallel group.

        Example:
            >>> Layout(gpus=128, tp=2).node_gpus(8), Layout(gpus=36, tp=4).node_gpus(8)
            (8, 4)
        """
        return _node_gpus(self.gpus, max(self.tp, self.etp), per_node)

    def micro_batches(self, global_batch: int) -> int:
        """Return the number of micro-batches of a rank in a step."""
        return global_batch // (self.dp * self.micro_batch)

    def chunks(self, arch: Architecture, stage: int) -> list[Chunk]:
        """List the chunks of a pipeline stage, one for every virtual stage."""
        chunks, begin = [], 0
        for virtual in range(self.vp):
            for other in range(self.pp):
                end = begin + self._chunk_layers(arch.num_layers, other, virtual)
                if other == stage:
                    first, last = stage == 0 and virtual == 0, stage == self.pp - 1 and virtual == self.vp - 1
                    chunks.append(Chunk(range(begin, end), first, last))
                begin = end
        return chunks

    def stage_layers(self, layers: int) -> list[int]:
        """Return the number of layers of each pipeline stage."""
        if not (self.first or self.last or self.embedding or self.loss):
            return [layers // self.pp] * self.pp
        each = range(self.vp)
        return [sum(self._chunk_layers(layers, stage, virtual) for virtual in each) for stage in range(self.pp)]

    def _chunk_layers(self, layers: int, stage: int, virtual: int) -> int:
        ends = {0: self.first, self.pp - 1: self.last} if self.pp > 1 else {}
        fixed = {end: count for end, count in ends.items() if count is not None}
        if stage in fixed:
            return fixed[stage] // self.vp
        left = layers - sum(fixed.values()) + self.embedding + self.loss
        count = left // (self.pp - len(fixed)) // self.vp
        count -= self.embedding if stage == 0 and virtual == 0 else 0
        return count - (self.loss if stage == self.pp - 1 and virtual == self.vp - 1 else 0)

    def padded_vocab(self, arch: Architecture) -> int:
        """Return the number of rows of the embedding over all ranks, as NeMo pads it."""
        multiple = VOCABULARY_MULTIPLE * self.tp
        return -(-arch.vocab_size // multiple) * multiple


#: Sizes that a layout's text may name, in addition to `mbs` (the micro-batch) and `dp`.
SIZES = {field.name for field in fields(Layout)} - {"gpus", "micro_batch"}


def parse_layout(text: str, gpus: int, micro_batch: int | None = None) -> Layout:
    """Parse a layout such as `tp=2,pp=4,vp=8,cp=1,ep=8,etp=1`, separated by commas or blanks.

    An omitted size is 1. But an omitted etp equals tp if ep is 1, because Megatron-Core supports only this value if ep
    is 1.

    Args:
        text: the layout.
        gpus: number of ranks.
        micro_batch: sequences of one micro-batch, if given separately from the text.

    Raises:
        SpecError: a name or a number is invalid, or given twice.
    """
    names = SIZES | {"mbs"}
    sizes: dict[str, int] = {}
    parts = re.sub(r"\s*=\s*", "=", text).replace(",", " ").split()
    if not parts:
        raise SpecError(
            field="layout", kind="missing", got="is empty", fix="write name=number, for example tp=2,pp=4,ep=8"
        )
    for part in parts:
        name, _, number = part.partition("=")
        if name not in names and name != "dp":
            raise SpecError.unknown("layout key", name, names)
        if not number.isdecimal() or len(number) > 9:
            raise SpecError(
                field="layout",
                got=repr(part),
                expected="name=number, for example tp=2,pp=4,ep=8",
                fix="write a whole number",
            )
        field = "micro_batch" if name == "mbs" else name
        if field in sizes:
            raise SpecError(field="layout", kind="state", got=f"has {name} twice", fix="keep one of them")
        sizes[field] = int(number)
    if micro_batch is not None and sizes.setdefault("micro_batch", micro_batch) != micro_batch:
        raise SpecError(
            field="micro_batch",
            kind="refused",
            got=f"is {micro_batch}, and the layout says mbs={sizes['micro_batch']}",
            fix="give only one of them",
        )
    dp = sizes.pop("dp", None)
    if sizes.get("ep", 1) == 1:
        sizes.setdefault("etp", sizes.get("tp", 1))
    layout = Layout(gpus=gpus, **sizes)
    if dp is not None and layout.tp * layout.cp * layout.pp * dp != gpus:
        needed = layout.tp * layout.cp * layout.pp * dp
        raise SpecError(field="gpus", got=gpus, expected=f"{needed} (tp x cp x pp x dp)", fix="omit dp")
    return layout


@functools.cache
def _node_gpus(gpus: int, group: int, per_node: int) -> int:
    sizes = [size for size in range(1, per_node + 1) if gpus % size == 0]
    return max((size for size in sizes if size % group == 0), default=sizes[-1])


def divisors(number: int) -> list[int]:
    """Return the divisors of a number in ascending order."""
    return [n for n in range(1, number + 1) if number % n == 0]
