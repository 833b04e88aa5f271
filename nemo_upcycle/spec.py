"""What to build from a dense model: `UpcycleSpec`, checked when it is made."""

# No postponed annotations: NeMo-Run reads those of the fields, for overrides on the command line.

import importlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_upcycle.errors import SpecError
from nemo_upcycle.utils.validation import check_number, check_whole


if TYPE_CHECKING:
    import torch

    Rows = Callable[["UpcycleSpec", int, int, Sequence[torch.Generator]], torch.Tensor]

#: Init method -> why a model that it makes is not exact, "" if it is: `init/methods` hands in each.
INIT_METHODS: dict[str, Callable[["UpcycleSpec"], str]] = {}
#: Score and order -> kind of router, and name -> initialisation of its weights: `init/routers` hands in each.
ROUTER_KINDS: dict[tuple[str, str], "RouterKind"] = {}
ROUTER_INITS: dict[str, "RouterInit"] = {}
#: The scores and orders of the kinds.
ROUTER_SCORES: list[str] = []
ROUTER_ORDERS: list[str] = []
OUTPUT_SCALES = ("exact", "none")
MOE_LAYERS = ("all", "every-N", "first-K-dense", "a list of layer numbers")
#: Four times the experts of the largest open models: beyond it, names and headers alone take minutes.
MAX_EXPERTS = 2048
#: Distance of a float32 number to the next one, at most, over the number.
FLOAT32 = 2.0**-23


@dataclass(frozen=True, kw_only=True)
class UpcycleSpec:
    """How a dense model becomes a Mixture-of-Experts model; by default as in the paper (arXiv 2412.09952, section 2).

    Args:
        num_experts: E, routed experts in every MoE layer, at most 2048; a multiple of those that the parent has.
        top_k: experts that a token passes through; 1 with `softmax_topk` or sigmoid only, as in Megatron.
        granularity: G. The dense network's F neurons are cut into G shards; expert `c G + g` holds shard g, and the
            experts of one copy c share their router row, so that top-k, a multiple of G, picks whole networks
            ("virtual groups", arXiv 2410.07524). 1 keeps the network whole.
        method: `copy` (exact copies), `noise` (copies plus Gaussian noise), `drop` (Drop-Upcycling, arXiv 2502.19261:
            a part of every expert's neurons is drawn anew) or another one of `init/methods`.
        noise_std: for method `noise`, as a part of the standard deviation of the matrix it is added to.
        drop_ratio: for method `drop`, the part of the neurons.
        shared_experts: S, at most G: experts that every token passes through. They hold the shards 0 to S - 1, and
            what such a shard adds to the output comes half from them, half from the routed experts: the sum is exact.
        moe_layers: `all`; `every-N` (layers 0, N, 2N ...: Megatron's `moe_layer_freq`); `first-K-dense`; or the
            numbers of the MoE layers, from 0: `0,2,5`.
        router_init: `normal` (mean 0), `uniform` (mean 0) or `zero`; or from data, `prompts`.
        expert_utility: for a parent with experts, a YAML file with a number for each of them (or a list for each MoE
            layer): the more useful have more copies; without it all have as many.
        router_std: standard deviation of the router's weights; the paper gives none, 0.02 is the family's usual one.
            Of a parent with experts, that of what is added to its rows, as a part of their own.
        router_spread: for `prompts`, the standard deviation over the copies of a token's logits, root mean square over
            the prompts' tokens.
        router_prompts: for `prompts`, a YAML file: a list with the texts of each copy.
        calibration: what `nemo-upcycle calibrate` wrote, from which the rows for `prompts` are read; a pipeline makes
            its own where none is named.
        router_order: `topk_softmax` (Mixtral type: the weights of the chosen experts sum to one) or `softmax_topk`
            (ST type: they do not; `moe_router_pre_softmax` in Megatron).
        router_score: `softmax`, or `sigmoid` (DeepSeek-V3 type: the chosen scores divided by their sum, if top_k > 1).
        routed_scaling_factor: on the weights of the chosen experts (`moe_router_topk_scaling_factor` in Megatron).
        output_scale: `exact` scales the experts' down projection so that identical experts compute the dense function,
            see `down_scale`; `none` leaves the weights as they are, as the paper does.
        seed: for all random numbers: they depend on it, layer, expert and element of the matrix, never on the layout.

    Raises:
        SpecError: a value is out of range or unknown, or values contradict each other.

    Example:
        >>> UpcycleSpec(num_experts=8, top_k=2).down_scale
        1.0
        >>> UpcycleSpec(num_experts=16, top_k=4, granularity=2).down_scale
        2.0
    """

    num_experts: int = 8
    top_k: int = 2
    granularity: int = 1
    method: str = "copy"
    noise_std: float = 0.01
    drop_ratio: float = 0.5
    shared_experts: int = 0
    moe_layers: str = "all"
    expert_utility: str = ""
    router_init: str = "normal"
    router_std: float = 0.02
    router_spread: float = 1.0
    router_prompts: str = ""
    calibration: str = ""
    router_order: str = "topk_softmax"
    router_score: str = "softmax"
    routed_scaling_factor: float = 1.0
    output_scale: str = "exact"
    seed: int = 1234

    def __post_init__(self) -> None:
        for name, valid in (
            ("method", tuple(INIT_METHODS)),  # a value that has no hash is none of them
            ("router_init", tuple(ROUTER_INITS)),
            ("router_order", tuple(ROUTER_ORDERS)),
            ("router_score", tuple(ROUTER_SCORES)),
            ("output_scale", OUTPUT_SCALES),
        ):
            if getattr(self, name) not in valid:
                raise SpecError.unknown(name, str(getattr(self, name)), valid)
        check_whole("num_experts", self.num_experts, 2, MAX_EXPERTS)
        check_whole("top_k", self.top_k, 1, self.num_experts, "num_experts")
        check_whole("granularity", self.granularity, 1, self.num_experts, "num_experts")
        check_whole("shared_experts", self.shared_experts, 0, self.granularity, "granularity")
        check_whole("seed", self.seed, 0, 2**63 - 1)
        check_number("router_std", self.router_std, 0.0, 1000.0)
        check_number("router_spread", self.router_spread, 0.0, 1000.0)
        check_number("noise_std", self.noise_std, 0.0, 1000.0)
        check_number("drop_ratio", self.drop_ratio, 0.0, 1.0)
        check_number("routed_scaling_factor", self.routed_scaling_factor, 0.001, 1000.0)
        if self.num_experts % self.granularity:
            expected = f"a multiple of <granularity> ({self.granularity}), the experts of each copy of the network"
            nearest = self.granularity * max(1, round(self.num_experts / self.granularity))
            fix = f"set <num_experts>={nearest}"
            raise SpecError(field="num_experts", got=self.num_experts, expected=expected, fix=fix)
        orders = [order for score, order in ROUTER_KINDS if score == self.router_score]
        if self.router_order not in orders:
            raise SpecError(
                field="router_order",
                got=self.router_order,
                expected=f"{' or '.join(orders)} with <router_score>={self.router_score}",
                fix=f"keep <router_order>={orders[0]}",
            )
        self.router_kind.check(self)
        ROUTER_INITS[self.router_init].check(self)
        if self.calibration and not self.needs_calibration:
            got, fix = "is read only with <router_init>=prompts", "set that, or omit <calibration>"
            raise SpecError(field="calibration", kind="refused", got=got, fix=fix)
        object.__setattr__(self, "moe_layers", _layers(self.moe_layers))

    @property
    def copies(self) -> int:
        """How often the dense network is in a layer, E / G."""
        return self.num_experts // self.granularity

    @property
    def down_scale(self) -> float:
        """Factor on every expert's down projection.

        Only this matrix is scaled: the network is linear in it, so the factor acts on the output exactly, whatever the
        activation. With f = sum over the shards of f_g, and combine weights p_i equal within a copy, the layer gives
        down_scale * sum over the chosen copies of p * f = down_scale * sum(p_i) / G * f. The weights of the
        chosen k sum to r = routed_scaling_factor for `topk_softmax` and for sigmoid with k > 1, to r k / E for
        `softmax_topk` and to r / 2 for sigmoid with k = 1, the last two with a zero router. (That ties all experts:
        with granularity, which of a network's shards top-k takes is then left to chance.)
        """
        return self.granularity / self.weight_sum if self.output_scale == "exact" else 1.0

    @property
    def router_kind(self) -> "RouterKind":
        """The kind of its routers."""
        return ROUTER_KINDS[self.router_score, self.router_order]

    @property
    def weight_sum(self) -> float:
        """What the weights of the chosen experts sum to; where the router decides it, with a zero router."""
        return self.routed_scaling_factor * self.router_kind.weight_sum(self)

    @property
    def sums_to_one(self) -> bool:
        """Whether the weights of the chosen experts are made to sum to one, before `routed_scaling_factor`."""
        return self.router_kind.sums_to_one(self)

    @property
    def bias_scale(self) -> float:
        """Factor on every expert's output bias, which each of the chosen k adds whole, 1 / sum(p_i)."""
        return 1.0 / self.weight_sum if self.output_scale == "exact" else 1.0

    @property
    def shared_scale(self) -> float:
        """Factor on the shared experts' down projection; the routed experts of the same shards have the other half."""
        return 0.5

    def expert_scale(self, expert: int) -> float:
        """Factor on one routed expert's down projection."""
        is_shared = expert % self.granularity < self.shared_experts
        return self.down_scale * (1 - self.shared_scale if is_shared else 1)

    @property
    def needs_calibration(self) -> bool:
        """Whether its routers' rows are read from a calibration file."""
        return ROUTER_INITS[self.router_init].from_data

    @property
    def _has_zero_router(self) -> bool:
        return ROUTER_INITS[self.router_init].is_zero(self)

    @property
    def inexact_because(self) -> tuple[str, ...]:
        """Why the upcycled model does not compute the dense function at step 0; empty if it does, in exact numbers.

        `init.routers.inexact_in_float32` knows what float32 adds, which depends on the parent's hidden size, and
        `models.growth.inexact_because` both.
        """
        free_sum = not self.sums_to_one and not self._has_zero_router
        changed = INIT_METHODS[self.method](self)
        torn, part = self.top_k % self.granularity, self.weight_sum / self.granularity
        tied = self._has_zero_router and self.granularity > 1 and self.top_k < self.num_experts
        reasons = (
            (changed, changed),
            (
                torn,
                f"top_k={self.top_k} is no multiple of granularity={self.granularity}: tokens get parts of networks",
            ),
            (tied and not torn, "a zero router scores all experts equally, so top-k chooses parts of networks"),
            (free_sum, "the sum of the chosen experts' weights is known only with a zero router"),
            (self.output_scale == "none" and part != 1, f"output_scale=none leaves {part:.4g} of the dense output"),
        )
        return tuple(reason for holds, reason in reasons if holds)

    @property
    def needs_float32_routing(self) -> bool:
        """Whether top-k picks whole networks only where the router's logits are float32 or more.

        The experts of one copy have the same logit. In 16 bits those of two copies can be the same as well: top-k then
        picks parts of both.
        """
        picks_groups = self.granularity > 1 and self.top_k < self.num_experts and self.top_k % self.granularity == 0
        return picks_groups and not self._has_zero_router

    @property
    def is_exact(self) -> bool:
        """Whether the upcycled model computes the dense function at step 0, in exact numbers."""
        return not self.inexact_because

    def moe_pattern(self, num_layers: int) -> tuple[bool, ...]:
        """Return which of a model's layers are MoE layers.

        Raises:
            SpecError: the numbers do not fit the model, or no layer is one.
        """
        numbers = [int(number) for number in self.moe_layers.split(",") if number.isdigit()]
        if numbers:
            if numbers[-1] >= num_layers:
                expected = f"0 to {num_layers - 1} (the model has {num_layers} layers)"
                raise SpecError(field="moe_layers", got=numbers[-1], expected=expected, fix="correct the list")
            pattern = tuple(layer in numbers for layer in range(num_layers))
        else:
            kind, _, rest = self.moe_layers.partition("-")
            count = int(rest.partition("-")[0] or 0)
            rules: dict[str, Callable[[int], bool]] = {
                "all": lambda i: True,
                "every": lambda i: i % count == 0,
                "first": lambda i: i >= count,
            }
            pattern = tuple(rules[kind](layer) for layer in range(num_layers))
        if not any(pattern):
            got = f"{self.moe_layers} gives none of the {num_layers} layers experts"
            raise SpecError(field="moe_layers", kind="state", got=got, fix="set <moe_layers>=all")
        return pattern

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes, and the other fields that are not at their default, as plain values, for receipts.

        A field that a later release adds changes nothing of what is written, unless it is used.
        """
        return {"num_experts": self.num_experts, "top_k": self.top_k} | without_defaults(asdict(self))


def without_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of fields of an `UpcycleSpec`, as they are or as the text of markers, that are not the default.

    Example:
        >>> without_defaults({"num_experts": 16, "noise_std": 0.01, "method": '"copy"'})
        {'num_experts': 16}
    """
    known = {name: one.default for name, one in UpcycleSpec.__dataclass_fields__.items()}
    defaults = {name: (default, json.dumps(default), str(default)) for name, default in known.items()}
    return {name: value for name, value in values.items() if value not in defaults.get(name, ())}


class RouterKind(ABC):
    """How routers turn logits into the weights of the chosen experts. One file a kind in `init/routers`."""

    #: what `UpcycleSpec.router_score` and `.router_order` call it; `score` is Megatron's `moe_router_score_function`
    score: ClassVar[str]
    order: ClassVar[str]
    #: Megatron's `moe_router_pre_softmax`
    pre_softmax: ClassVar[bool]
    #: whether Hugging Face classes with it compute its logits in float32, not in the model's type
    in_float32: ClassVar[bool] = False
    #: the largest of the logits must be above it, or the sum by which scores are divided is not theirs in float32
    least_logit: ClassVar[float] = float("-inf")

    @abstractmethod
    def weight_sum(self, spec: UpcycleSpec) -> float:
        """Compute the sum of the chosen weights, unscaled; where the router decides it, with a zero router."""

    def scores(self, logits_TE: "torch.Tensor") -> "torch.Tensor":
        """Return the scores by which top-k chooses, from the logits [T, E] in float32; by default their softmax."""
        return logits_TE.softmax(-1)

    def sums_to_one(self, spec: UpcycleSpec) -> bool:
        """Return whether the chosen weights are made to sum to one, whatever the router."""
        return self.weight_sum(spec) == 1

    def check(self, spec: UpcycleSpec) -> None:  # noqa: B027 - most kinds refuse nothing
        """Check that a model can be trained with such routers.

        Raises:
            SpecError: it cannot.
        """

    def spacing(self, logit: float) -> float:
        """Return how much two logits near this one must differ for float32 scores that differ; softmax's by default.

        Neighbouring scores of softmax differ by 2^-23 of themselves at most, which a logit 2^-23 larger makes;
        neighbouring logits by as much of their own size.
        """
        return FLOAT32 * max(1.0, abs(logit))


def find_router_kind(score: str, *, pre_softmax: bool) -> RouterKind:
    """Return the kind of routers with a score, the one with softmax before or after top-k where a score has both.

    Args:
        score: what the logits go through, as Megatron calls it.
        pre_softmax: Megatron's `moe_router_pre_softmax`.

    Raises:
        SpecError: there is no such score.
    """
    kinds = [kind for kind in ROUTER_KINDS.values() if kind.score == score]
    if not kinds:
        raise SpecError.unknown("router_score", score, ROUTER_SCORES)
    return next((kind for kind in kinds if kind.pre_softmax is pre_softmax), kinds[0])


@dataclass(frozen=True)
class RouterInit:
    """An initialisation of the routers' weights, as `init.routers.router_init` registers it.

    Args:
        name: `UpcycleSpec.router_init` of models that have it.
        rows: its function: spec, layer, D and a generator for each copy -> the rows of the copies, [C, D] in float64.
        from_data: whether the rows are read from a calibration file; else they are drawn.
        always_zero: whether all weights are zero for every spec.
    """

    name: str
    rows: "Rows"
    from_data: bool
    always_zero: bool

    def is_zero(self, spec: UpcycleSpec) -> bool:
        """Return whether all weights are zero."""
        return self.always_zero or (spec.router_spread if self.from_data else spec.router_std) == 0

    def check(self, spec: UpcycleSpec) -> None:
        """Check the settings that only initialisations from data have.

        Raises:
            SpecError: one is given to an initialisation that draws its rows, or is missing.
        """
        if self.from_data and not spec.router_prompts and not spec.calibration:
            raise SpecError(
                field="router_prompts",
                kind="missing",
                got="is missing",
                expected="<router_init>=prompts reads a file with texts for each copy",
                fix="name that file, or the <calibration> that was made from it",
            )
        if spec.router_prompts and not self.from_data:
            got, fix = "is read only with <router_init>=prompts", "set that, or omit <router_prompts>"
            raise SpecError(field="router_prompts", kind="refused", got=got, fix=fix)


def _layers(value: str | Sequence[int]) -> str:
    """Return the layers as a rule, or their numbers sorted: `0,2,5`. A sequence of numbers is accepted as well."""
    if isinstance(value, str) and re.fullmatch(r"all|every-[1-9]\d{0,5}|first-\d{1,6}-dense", value):
        return value
    if isinstance(value, str) and not re.fullmatch(r"\d{1,6}(,\d{1,6})*", value):
        raise SpecError.unknown("moe_layers", value, MOE_LAYERS)
    numbers = [int(number) for number in value.split(",")] if isinstance(value, str) else value
    is_list = isinstance(numbers, Sequence) and all(type(number) is int and number >= 0 for number in numbers)
    if not is_list or not numbers:
        raise SpecError(field="moe_layers", got=value, expected="layer numbers from 0", fix="set <moe_layers>=0,2,4")
    return ",".join(str(number) for number in sorted(set(numbers)))


# A spec checks its names, which stand in the room above: whoever imports this module knows them.
importlib.import_module("nemo_upcycle.init")
