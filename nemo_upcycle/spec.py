"""`UpcycleSpec`, the settings with which a dense model is upcycled. A new spec checks its settings."""

# Annotations are not postponed, because NeMo-Run reads the fields' annotations for overrides on the command line.

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

#: Init method -> function that returns why models are not exact, or "" if they are. `init/methods` fills the table.
INIT_METHODS: dict[str, Callable[["UpcycleSpec"], str]] = {}
#: Score and order -> kind of router, and name -> initialisation of its weights. `init/routers` fills both tables.
ROUTER_KINDS: dict[tuple[str, str], "RouterKind"] = {}
ROUTER_INITS: dict[str, "RouterInit"] = {}
#: Scores and orders of all kinds of router.
ROUTER_SCORES: list[str] = []
ROUTER_ORDERS: list[str] = []
OUTPUT_SCALES = ("exact", "none")
MOE_LAYERS = ("all", "every-N", "first-K-dense", "a list of layer numbers")
#: Four times as many experts as in the largest open models. With more experts, names and headers take minutes.
MAX_EXPERTS = 2048
#: Largest relative distance between a float32 number and the next one.
FLOAT32 = 2.0**-23


@dataclass(frozen=True, kw_only=True)
class UpcycleSpec:
    """How a dense model becomes a Mixture-of-Experts model. Defaults are the paper's (arXiv 2412.09952, section 2).

    Args:
        num_experts: E, number of routed experts in every MoE layer, at most 2048. For a parent with experts, a
            multiple of the parent's number of experts. With `expert_utility`, any larger number is allowed.
        top_k: number of experts that a token passes through. 1 is allowed only with `softmax_topk` or sigmoid scores,
            as in Megatron.
        granularity: G, number of shards into which the dense network's F neurons are cut; 1 keeps the network whole.
            Expert `c G + g` holds shard g of copy c. The experts of a copy share their router row. Therefore, if top_k
            is a multiple of G, top-k picks whole networks ("virtual groups", arXiv 2410.07524).
        method: `copy` (exact copies), `noise` (copies plus Gaussian noise), `drop` (Drop-Upcycling, arXiv 2502.19261:
            some neurons of every expert are drawn anew) or another method of `init/methods`.
        noise_std: for method `noise`: standard deviation of the noise, as a fraction of the matrix's standard
            deviation.
        drop_ratio: for method `drop`: fraction of the neurons that is drawn anew.
        shared_experts: S, number of experts that every token passes through, at most G. They hold the shards 0 to
            S - 1. Shared and routed experts each provide half of the output of such a shard, so the sum is exact.
        moe_layers: layers with experts: `all`, `every-N` (layers 0, N, 2N ..., Megatron's `moe_layer_freq`),
            `first-K-dense`, or layer numbers from 0, such as `0,2,5`.
        router_init: initialisation: `normal` (mean 0), `uniform` (mean 0), `zero`, or `prompts` (from data).
        expert_utility: for a parent with experts: YAML file with one number for each expert, or one such list for each
            MoE layer. More useful experts get more copies. Without a file, all experts get the same number.
        router_std: standard deviation of the router's weights. The paper gives no value; 0.02 is usual. For a parent
            with experts: standard deviation of the noise on the router rows, as a fraction of the rows' standard
            deviation.
        router_spread: for `prompts`: standard deviation of a token's logits over the copies (root mean square over the
            prompts' tokens).
        router_prompts: for `prompts`: YAML file with a list of the texts of each copy.
        calibration: for `prompts`: file with router rows (`nemo-upcycle calibrate`). Otherwise a pipeline makes it.
        router_order: `topk_softmax` (Mixtral type: the weights of the chosen experts sum to one) or `softmax_topk`
            (ST type: the weights do not sum to one; `moe_router_pre_softmax` in Megatron).
        router_score: `softmax`, or `sigmoid` (DeepSeek-V3 type: the chosen scores divided by their sum, if top_k > 1).
        routed_scaling_factor: factor on the chosen experts' weights (`moe_router_topk_scaling_factor` in Megatron).
        output_scale: `exact` scales the experts' down projection so that identical experts compute the dense function,
            see `down_scale`. `none` leaves the weights as they are, like the paper.
        seed: seed of all random numbers. A random number depends on seed, layer, expert and matrix element, never on
            the layout.

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
            ("method", tuple(INIT_METHODS)),  # tuples, because unhashable values must be refused, too
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
            got, fix = "is read only with <router_init>=prompts", "set <router_init>=prompts, or omit <calibration>"
            raise SpecError(field="calibration", kind="refused", got=got, fix=fix)
        object.__setattr__(self, "moe_layers", _layers(self.moe_layers))

    @property
    def copies(self) -> int:
        """Number of copies of the dense network in a layer, E / G."""
        return self.num_experts // self.granularity

    @property
    def down_scale(self) -> float:
        """Factor on every expert's down projection.

        Only this matrix is scaled. The network is linear in this matrix, so the factor scales the output exactly,
        whatever the activation. Let f be the sum of f_g over the shards, and let the combine weights p_i be equal
        within a copy. Then the layer computes down_scale * sum over the chosen copies of p * f = down_scale * sum(p_i)
        / G * f. The weights of the k chosen experts sum to r = routed_scaling_factor for `topk_softmax` and for
        sigmoid with k > 1. With a zero router they sum to r k / E for `softmax_topk`, and to r / 2 for sigmoid with
        k = 1. With a zero router all experts tie, and with granularity, chance decides which shards top-k takes.
        """
        return self.granularity / self.weight_sum if self.output_scale == "exact" else 1.0

    @property
    def router_kind(self) -> "RouterKind":
        """Kind of the model's routers."""
        return ROUTER_KINDS[self.router_score, self.router_order]

    @property
    def weight_sum(self) -> float:
        """Sum of the weights of the chosen experts. If it depends on the router, the sum for a zero router."""
        return self.routed_scaling_factor * self.router_kind.weight_sum(self)

    @property
    def sums_to_one(self) -> bool:
        """Whether the weights of the chosen experts are normalised to sum to one, before `routed_scaling_factor`."""
        return self.router_kind.sums_to_one(self)

    @property
    def bias_scale(self) -> float:
        """Factor on every expert's output bias, 1 / sum(p_i), because each chosen expert adds the whole bias."""
        return 1.0 / self.weight_sum if self.output_scale == "exact" else 1.0

    @property
    def shared_scale(self) -> float:
        """Factor on the shared experts' down projection. Routed experts of the same shards provide the other half."""
        return 0.5

    def expert_scale(self, expert: int) -> float:
        """Return the factor on one routed expert's down projection."""
        is_shared = expert % self.granularity < self.shared_experts
        return self.down_scale * (1 - self.shared_scale if is_shared else 1)

    @property
    def needs_calibration(self) -> bool:
        """Whether the router rows are read from a calibration file."""
        return ROUTER_INITS[self.router_init].from_data

    @property
    def _has_zero_router(self) -> bool:
        return ROUTER_INITS[self.router_init].is_zero(self)

    @property
    def inexact_because(self) -> tuple[str, ...]:
        """Why the upcycled model does not compute the dense function at step 0; empty if it does in exact arithmetic.

        `init.routers.inexact_in_float32` returns the reasons that float32 adds, which depend on the parent's hidden
        size. `models.growth.inexact_because` returns both kinds of reasons.
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
        """Whether top-k needs router logits in float32 or more to pick whole networks.

        The experts of one copy have the same logit. In 16 bits, two copies can have equal logits, too, and top-k then
        picks parts of both copies.
        """
        picks_groups = self.granularity > 1 and self.top_k < self.num_experts and self.top_k % self.granularity == 0
        return picks_groups and not self._has_zero_router

    @property
    def is_exact(self) -> bool:
        """Whether the upcycled model computes the dense function at step 0 in exact arithmetic."""
        return not self.inexact_because

    def moe_pattern(self, num_layers: int) -> tuple[bool, ...]:
        """Return which of a model's layers are MoE layers.

        Raises:
            SpecError: a layer number does not fit the model, or no layer is an MoE layer.
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
            got = f"{self.moe_layers} selects none of the {num_layers} layers, so the model would have no experts"
            raise SpecError(field="moe_layers", kind="state", got=got, fix="set <moe_layers>=all")
        return pattern

    def to_dict(self) -> dict[str, Any]:
        """Return the sizes, and all other fields that are not at their default, as plain values for receipts.

        A field that a later release adds does not change the result unless it is used.
        """
        return {"num_experts": self.num_experts, "top_k": self.top_k} | without_defaults(asdict(self))


def without_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Omit the `UpcycleSpec` fields that have their default value; a value may be the text of a marker.

    Example:
        >>> without_defaults({"num_experts": 16, "noise_std": 0.01, "method": '"copy"'})
        {'num_experts': 16}
    """
    known = {name: one.default for name, one in UpcycleSpec.__dataclass_fields__.items()}
    defaults = {name: (default, json.dumps(default), str(default)) for name, default in known.items()}
    return {name: value for name, value in values.items() if value not in defaults.get(name, ())}


class RouterKind(ABC):
    """How routers turn logits into the weights of the chosen experts. Each kind has a file in `init/routers`."""

    #: values of `UpcycleSpec.router_score` and `.router_order`; `score` is also Megatron's `moe_router_score_function`
    score: ClassVar[str]
    order: ClassVar[str]
    #: Megatron's `moe_router_pre_softmax`
    pre_softmax: ClassVar[bool]
    #: whether Hugging Face classes with this kind compute the logits in float32 instead of the model's type
    in_float32: ClassVar[bool] = False
    #: if the largest logit is at least this, the divisor of the scores equals the sum of the scores in float32
    least_logit: ClassVar[float] = float("-inf")

    @abstractmethod
    def weight_sum(self, spec: UpcycleSpec) -> float:
        """Compute the unscaled sum of the chosen weights. If it depends on the router, assume a zero router."""

    def scores(self, logits_TE: "torch.Tensor") -> "torch.Tensor":
        """Return the scores by which top-k chooses, from the logits [T, E] in float32; by default their softmax."""
        return logits_TE.softmax(-1)

    def sums_to_one(self, spec: UpcycleSpec) -> bool:
        """Return whether the chosen weights are normalised to sum to one, whatever the router."""
        return self.weight_sum(spec) == 1

    def check(self, spec: UpcycleSpec) -> None:  # noqa: B027 - most kinds refuse nothing
        """Check that a model can be trained with routers of this kind.

        Raises:
            SpecError: the model cannot be trained.
        """

    def spacing(self, logit: float) -> float:
        """Return how much two logits near this value must differ to give different float32 scores.

        The default is for softmax. Neighbouring float32 scores differ by at most 2^-23 of their value, and a logit
        that is 2^-23 larger gives this difference. Neighbouring float32 logits differ by at most 2^-23 of their value.
        """
        return FLOAT32 * max(1.0, abs(logit))


def find_router_kind(score: str, *, pre_softmax: bool) -> RouterKind:
    """Return the kind of router with a score. If a score has two kinds, `pre_softmax` decides.

    Args:
        score: Megatron's name of the function that turns logits into scores.
        pre_softmax: Megatron's `moe_router_pre_softmax`.

    Raises:
        SpecError: the score is unknown.
    """
    kinds = [kind for kind in ROUTER_KINDS.values() if kind.score == score]
    if not kinds:
        raise SpecError.unknown("router_score", score, ROUTER_SCORES)
    return next((kind for kind in kinds if kind.pre_softmax is pre_softmax), kinds[0])


@dataclass(frozen=True)
class RouterInit:
    """An initialisation of the routers' weights, registered by `init.routers.router_init`.

    Args:
        name: value of `UpcycleSpec.router_init`.
        rows: function that makes the router rows: spec, layer, D and one generator per copy -> rows of the copies
            [C, D], float64.
        from_data: whether the rows are read from a calibration file. If not, they are drawn.
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
            SpecError: such a setting is missing, or is given to an initialisation that draws its rows.
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
            got, fix = "is read only with <router_init>=prompts", "set <router_init>=prompts, or omit <router_prompts>"
            raise SpecError(field="router_prompts", kind="refused", got=got, fix=fix)


def _layers(value: str | Sequence[int]) -> str:
    """Return the layers as a rule, or as sorted numbers such as `0,2,5`. The value may be a sequence of numbers."""
    if isinstance(value, str) and re.fullmatch(r"all|every-[1-9]\d{0,5}|first-\d{1,6}-dense", value):
        return value
    if isinstance(value, str) and not re.fullmatch(r"\d{1,6}(,\d{1,6})*", value):
        raise SpecError.unknown("moe_layers", value, MOE_LAYERS)
    numbers = [int(number) for number in value.split(",")] if isinstance(value, str) else value
    is_list = isinstance(numbers, Sequence) and all(type(number) is int and number >= 0 for number in numbers)
    if not is_list or not numbers:
        raise SpecError(field="moe_layers", got=value, expected="layer numbers from 0", fix="set <moe_layers>=0,2,4")
    return ",".join(str(number) for number in sorted(set(numbers)))


# A spec checks names that `init` registers. Importing `init` here registers the names when this module is imported.
importlib.import_module("nemo_upcycle.init")
