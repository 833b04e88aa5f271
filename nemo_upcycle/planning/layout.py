"""How a cluster cuts a model: the rules a layout has to obey, who is in which group, which layers a rank holds.

Megatron-Core's rules and orders (tp fastest, then cp, dp, pp; for experts etp, ep, expert dp, pp), without Megatron.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import NamedTuple

from nemo_upcycle.architecture import Architecture
from nemo_upcycle.errors import SpecError, problem, unknown


#: NeMo pads the vocabulary to a multiple of this times TP (`make_vocab_size_divisible_by`).
VOCABULARY_MULTIPLE = 128


class Seat(NamedTuple):
    """Where a rank stands in the groups of the dense part (tp, cp, dp, pp) and of the experts (etp, ep, expert_dp)."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    expert_dp: int


class Chunk(NamedTuple):
    """The part of the model that one virtual stage of a pipeline stage holds."""

    layers: range
    has_embedding: bool
    has_output: bool


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Parallel sizes.

    Args:
        gpus: ranks.
        tp: tensor parallelism of all but the routed experts; above 1 with sequence parallelism, as MoE needs it.
        pp: pipeline stages.
        vp: virtual stages of each pipeline stage (chunks); 1 without interleaving.
        cp: context parallelism.
        ep: expert parallelism.
        etp: tensor parallelism of the routed experts; folded, so it need not be tp.
        micro_batch: sequences of one micro-batch.
        first: layers of the first pipeline stage, where it is to differ (`num_layers_in_first_pipeline_stage`).
        last: layers of the last pipeline stage, where it is to differ.
        embedding: 1 counts the embedding as a layer when layers are dealt out (`account_for_embedding_in_...`).
        loss: 1 counts the output layer as one (`account_for_loss_in_pipeline_split`).

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

    def __str__(self) -> str:
        names = [name for name in ("tp", "pp", "vp", "cp", "ep") if getattr(self, name) > 1]
        names += ["etp"] if self.etp > 1 and self.ep > 1 else []  # else it is tp
        names += [name for name in ("first", "last", "embedding", "loss") if getattr(self, name)]
        sizes = "".join(f"{name}={getattr(self, name)}," for name in names)
        return f"{sizes}dp={self.dp},mbs={self.micro_batch}"

    @property
    def dp(self) -> int:
        """Copies of the dense part, each with its own data."""
        return self.gpus // (self.tp * self.cp * self.pp)

    @property
    def expert_dp(self) -> int:
        """Copies of every routed expert."""
        return self.gpus // (self.etp * self.ep * self.pp)

    @property
    def dense_shards(self) -> int:
        """Ranks over which the distributed optimizer cuts the states of the dense part: dp x cp."""
        return self.dp * self.cp

    def micro_batches(self, global_batch: int) -> int:
        """Return how many micro-batches every rank works through in a step."""
        return global_batch // (self.dp * self.micro_batch)

    def seat(self, rank: int) -> Seat:
        """Return where a rank stands.

        Raises:
            SpecError: there is no such rank.
        """
        if not 0 <= rank < self.gpus:
            raise SpecError(problem("rank", got=rank, expected=f"0 to {self.gpus - 1}", fix="choose one of them"))
        tp, rest = rank % self.tp, rank // self.tp
        cp, rest = rest % self.cp, rest // self.cp
        dp, pp = rest % self.dp, rest // self.dp
        etp, rest = rank % self.etp, rank // self.etp
        ep, rest = rest % self.ep, rest // self.ep
        return Seat(tp, cp, dp, pp, etp, ep, rest % self.expert_dp)

    def chunks(self, arch: Architecture, stage: int) -> list[Chunk]:
        """Return what a pipeline stage holds, a chunk for every virtual stage."""
        found, begin = [], 0
        for virtual in range(self.vp):
            for other in range(self.pp):
                end = begin + self._chunk_layers(arch.num_layers, other, virtual)
                if other == stage:
                    first, last = stage == 0 and virtual == 0, stage == self.pp - 1 and virtual == self.vp - 1
                    found.append(Chunk(range(begin, end), first, last))
                begin = end
        return found

    def stage_layers(self, layers: int) -> list[int]:
        """Return how many layers each pipeline stage holds."""
        if not (self.first or self.last or self.embedding or self.loss):
            return [layers // self.pp] * self.pp
        each = range(self.vp)
        return [sum(self._chunk_layers(layers, stage, virtual) for virtual in each) for stage in range(self.pp)]

    def _chunk_layers(self, layers: int, stage: int, virtual: int) -> int:
        fixed = {0: self.first, self.pp - 1: self.last} if self.pp > 1 else {}
        fixed = {where: count for where, count in fixed.items() if count is not None}
        if stage in fixed:
            return (fixed[stage] or 0) // self.vp
        left = layers - sum(count or 0 for count in fixed.values()) + self.embedding + self.loss
        count = left // (self.pp - len(fixed)) // self.vp
        count -= self.embedding if stage == 0 and virtual == 0 else 0
        return count - (self.loss if stage == self.pp - 1 and virtual == self.vp - 1 else 0)

    def padded_vocab(self, arch: Architecture) -> int:
        """Return the rows of the embedding over all ranks, as NeMo pads them."""
        multiple = VOCABULARY_MULTIPLE * self.tp
        return -(-arch.vocab_size // multiple) * multiple

    def check(self, arch: Architecture, seq_length: int, global_batch: int) -> None:
        """Check every rule of divisibility.

        Args:
            arch: of the model that is trained.
            seq_length: tokens of a sequence.
            global_batch: sequences of a step.

        Raises:
            SpecError: one is broken; the text names it and the nearest good value.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            is_switch = field.name in ("embedding", "loss")
            if value is not None and (value not in (0, 1) if is_switch else value < 1):
                expected = "0 or 1" if is_switch else "1 or more"
                raise SpecError(problem(field.name, got=value, expected=expected, fix=f"set {field.name}=1"))
        self._check_model(arch)
        self._check_stages(arch)
        self._check_ranks()
        self._check_data(seq_length, global_batch)

    def _check_model(self, arch: Architecture) -> None:
        tensor = {"the key-value heads": arch.num_kv_heads}  # which divide the heads
        if arch.moe_layer_count < arch.num_layers:
            tensor["the feed-forward size"] = arch.ffn_size
        if arch.shared_ffn_size:
            tensor["the shared experts' feed-forward size"] = arch.shared_ffn_size
        for what, number in tensor.items():
            _require_divides("tp", self.tp, number, what)
        if arch.num_experts:
            _require_divides("ep", self.ep, arch.num_experts, "num_experts")
            _require_divides("etp", self.etp, arch.expert_ffn_size or 1, "an expert's feed-forward size")
            if self.ep == 1 and self.etp != self.tp:
                # It takes experts for dense parameters then, and sums their gradients over dp x cp.
                expected = f"tp ({self.tp}) where ep is 1: else Megatron-Core sums gradients over the wrong ranks"
                raise SpecError(problem("etp", got=self.etp, expected=expected, fix=f"set etp={self.tp}"))
        elif self.ep > 1:
            raise SpecError(problem("ep", got=self.ep, expected="1 for a dense model", fix="set ep=1"))

    def _check_stages(self, arch: Architecture) -> None:
        if self.vp > 1 and self.pp == 1:
            raise SpecError(problem("vp", got=self.vp, expected="1 without pipeline stages (pp=1)", fix="set vp=1"))
        fixed = [count for count in (self.first, self.last) if count is not None]
        if fixed and (self.embedding or self.loss or self.pp == 1):
            expected = "neither embedding=1 nor loss=1 beside them, and pp above 1 (Megatron-Core's rule)"
            got = ", ".join(str(count) for count in fixed)
            raise SpecError(problem("first and last", got=got, expected=expected, fix="leave one of them away"))
        for name in ("first", "last"):
            if (count := getattr(self, name)) and count % self.vp:
                _require_multiple(name, count, self.vp, f"vp ({self.vp})")
        left = arch.num_layers - sum(fixed) + self.embedding + self.loss
        stages = self.pp - len(fixed)
        what = f"{left} layers" if fixed or self.embedding or self.loss else f"num_layers ({left})"
        if (stages and (left < 0 or left % stages)) or (not stages and left):
            good = [n for n in divisors(left) if n >= 1] if left > 0 and stages else []
            expected = f"a divisor of {what}: {_listed(good)}" if good else f"stages that share out {what}"
            nearest = _nearest(self.pp - len(fixed), good) + len(fixed) if good else 1
            raise SpecError(problem("pp", got=self.pp, expected=expected, fix=f"set pp={nearest}"))
        if stages and left // stages % self.vp:
            _require_divides("vp", self.vp, left // stages, "the layers of a pipeline stage")

    def _check_ranks(self) -> None:
        for product, text in (
            (self.tp * self.cp * self.pp, "tp x cp x pp"),
            (self.etp * self.ep * self.pp, "etp x ep x pp"),
        ):
            if self.gpus % product:
                _require_multiple("gpus", self.gpus, product, f"{text} ({product})")

    def _check_data(self, seq_length: int, global_batch: int) -> None:
        multiple = (2 * self.cp if self.cp > 1 else 1) * self.tp
        if seq_length % multiple:
            text = f"tp{' x 2 x cp' if self.cp > 1 else ''} ({multiple})"
            _require_multiple("seq-length", seq_length, multiple, text)
        step = self.dp * self.micro_batch
        if global_batch % step:
            _require_multiple("global-batch", global_batch, step, f"dp x micro-batch ({self.dp} x {self.micro_batch})")
        if self.vp > 1 and self.micro_batches(global_batch) % self.pp:
            text = f"dp x micro-batch x pp ({step} x {self.pp}), which interleaved stages (vp above 1) need"
            _require_multiple("global-batch", global_batch, step * self.pp, text)


def parse_layout(text: str, gpus: int) -> Layout:
    """Return the layout that a text such as `tp=2,pp=4,vp=8,cp=1,ep=8,etp=1` describes.

    What is left out is 1; but etp is tp where experts are not spread, for Megatron-Core works no other way.

    Raises:
        SpecError: a name or a number is wrong.
    """
    names = {field.name for field in fields(Layout)} - {"gpus", "micro_batch"} | {"mbs"}
    sizes = {}
    for part in text.replace(" ", "").strip(",").split(","):
        name, _, number = part.partition("=")
        if name not in names and name != "dp":
            raise SpecError(unknown("layout key", name, names))
        if not number.isdecimal():
            expected = "name=number, for example tp=2,pp=4,ep=8"
            raise SpecError(problem("layout", got=repr(part), expected=expected, fix="write a whole number"))
        sizes["micro_batch" if name == "mbs" else name] = int(number)
    dp = sizes.pop("dp", None)
    if sizes.get("ep", 1) == 1:
        sizes.setdefault("etp", sizes.get("tp", 1))
    layout = Layout(gpus=gpus, **sizes)
    if dp is not None and layout.tp * layout.cp * layout.pp * dp != gpus:
        needed = layout.tp * layout.cp * layout.pp * dp
        raise SpecError(problem("gpus", got=gpus, expected=f"tp x cp x pp x dp ({needed})", fix="leave dp away"))
    return layout


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, from 1 on."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _listed(numbers: Iterable[int]) -> str:
    shown = [str(number) for number in numbers]
    return ", ".join(shown[:12]) + (" ..." if len(shown) > 12 else "")


def _nearest(value: int, good: Iterable[int]) -> int:
    return min(good, key=lambda number: (abs(number - value), number))


def _require_divides(name: str, value: int, number: int, what: str) -> None:
    if number % value:
        good = divisors(number)
        expected = f"a divisor of {what} ({number}): {_listed(good)}"
        raise SpecError(problem(name, got=value, expected=expected, fix=f"set {name}={_nearest(value, good)}"))


def _require_multiple(name: str, value: int, of: int, text: str) -> None:
    good = max(1, (2 * value + of) // (2 * of)) * of
    raise SpecError(problem(name, got=value, expected=f"a multiple of {text}", fix=f"set {name}={good}"))
