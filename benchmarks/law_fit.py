"""Fit the law of what pays to a grid: the form by parents that were left out, intervals by bootstrap over seeds."""

from __future__ import annotations

import csv
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares, nnls
from scipy.stats import t as student_t

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.planning.law import FORMS, RELATIVE, Law, OptionLaw, quantile, shape_name


#: Forms of an option that has a parent, and of one that begins from nothing.
WITH_PARENT, FROM_NOTHING = ("interaction", "product", "additive", "sum"), ("power",)
#: Numbers of tokens of an option from nothing: one more than its form has coefficients, since a fit leaves one out.
LEAST_LENGTHS = len(FORMS["power"].coefficients) + 1
#: Parent's tokens and tokens after it -> mean loss over the seeds.
Cells = dict[tuple[float, float], float]
Array = NDArray[np.float64]
DRAWS = 100
LEAST_PARENTS = 3  # of a fit
#: Forms whose held-out error is up to so many times the smallest may be right as well: the band reaches around them.
ALIKE = 2.0
#: Where the search for each exponent begins, in all combinations; the logarithm of w begins at 0.
_STARTS = (0.1, 0.4, 1.0)
_LIMIT = 10.0


class Point(NamedTuple):
    """A training.

    Args:
        option: name of its option in a `Law`: `dense`, `dense_from_nothing`, `upcycled_e8t2`,
            `moe_from_nothing_e8t2`.
        parent_tokens: tokens of its parent; 0 without one.
        tokens: tokens of this training.
        parameters: all of the model's parameters.
        seed: trainings of one seed see the same data in the same order.
        loss: held-out, in nats a token.
    """

    option: str
    parent_tokens: float
    tokens: float
    parameters: float
    seed: int
    loss: float


def read_points(path: Path) -> list[Point]:
    """Read a grid's `points.csv`: one row a training, no two of one option, parent, number of tokens and seed.

    Raises:
        UpcycleError: two rows are of one training.
    """
    rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    points: dict[tuple[str, float, float, int], Point] = {}
    for row in rows:
        option, shape = row["option"], shape_name(*(int(row[name]) for name in ("experts", "topk", "granularity")))
        if option.startswith("moe"):
            option = f"upcycled_{shape}" if option == "moe" else f"{option}_{shape}"
        sizes = [float(row[name]) for name in ("parent_tokens", "tokens", "total_parameters")]
        point = Point(option, *sizes, int(row["seed"]), float(row["loss"]))
        if points.setdefault(training := (option, *sizes[:2], point.seed), point) is not point:
            fix = "keep one: a trial with other settings is no seed"
            raise UpcycleError(f"{path}: {training}", got="two rows", expected="one row a training", fix=fix)
    return list(points.values())


@dataclass(frozen=True)
class _Fit:
    form: str
    exponents: Array
    amplitudes: Array
    squares: float

    @property
    def coefficients(self) -> list[float]:
        """In the order of `Form.coefficients`."""
        return [float(value) for value in (*self.amplitudes[:-1], *self.exponents, self.amplitudes[-1])]

    def loss(self, parent_tokens: float, tokens: float) -> float:
        terms = FORMS[self.form].terms(self.exponents, math.log(max(parent_tokens, 1)), math.log(tokens))
        return float(self.amplitudes @ [*terms, 1.0])


def fit_law(points: Sequence[Point], about: str, source: str, draws: int = DRAWS) -> Law:
    """Return the law that is fitted to a grid's trainings, each option by itself.

    An option from nothing with too few points is left out, as after a grid that was interrupted; the law says so.

    Args:
        points: one grid's: one parent architecture, one held-out set.
        about: what was trained.
        source: where the points are.
        draws: number of the bootstrap's.

    Raises:
        UpcycleError: another option has too few points for a fit, `dense` or `moe` is missing, or sizes of dense
            differ.
    """
    by_option: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        by_option[point.option].append(point)
    if "dense" not in by_option or not any(option.startswith("upcycled") for option in by_option):
        raise UpcycleError(
            f"grid {source}",
            got=f"the options {', '.join(by_option)}",
            expected=f"dense and moe, each with at least {LEAST_PARENTS} parents and 2 numbers of tokens",
            fix="add these trainings",
        )
    parameters, *others = sorted({point.parameters for point in by_option["dense"]})
    if others:
        got = f"dense models of {parameters:,.0f} and {others[0]:,.0f} parameters"
        raise UpcycleError(f"grid {source}", got=got, expected="those of one size", fix="make a file of each")
    means = {option: mean_cells(rows) for option, rows in by_option.items()}
    errors: dict[str, dict[str, Cells]] = {}
    left_out: dict[str, str] = {}
    for option in sorted(by_option):  # dense first: the others are compared with it
        has_parent, lengths = any(parent for parent, _ in means[option]), {tokens for _, tokens in means[option]}
        if not has_parent and len(lengths) < LEAST_LENGTHS:
            left_out[option] = f"{len(lengths)} of at least {LEAST_LENGTHS} numbers of tokens were trained"
        else:
            errors[option] = _held_out_errors(source, option, means, errors)
    held_out = {
        option: {form: _root_mean_square(of_form) for form, of_form in of.items()} for option, of in errors.items()
    }
    best = {option: min(of, key=lambda form: of[form]) for option, of in held_out.items()}
    laws = {}
    drawn = [drawn_means(by_option, number) for number in range(draws)]
    for option, form in best.items():
        cells = means[option]
        fitted = {name: _fit(name, _fitted_to(name, option, means)) for name in _alike(held_out[option])}
        exponents = fitted[form].exponents
        refitted = [_fit(form, _fitted_to(form, option, draw), exponents).coefficients for draw in drawn]
        parents, tokens = zip(*cells, strict=True)
        names = FORMS[form].coefficients
        coefficients = {
            name: dict(zip(FORMS[name].coefficients, fit.coefficients, strict=True)) for name, fit in fitted.items()
        }
        laws[option] = OptionLaw(
            form=form,
            coefficients=coefficients.pop(form),
            parent_tokens=(min(parents), max(parents)),
            tokens=(min(tokens), max(tokens)),
            parameters=(parameters, parameters),
            draws=[[float(f"{value:.7g}") for value in values] for values in refitted],
            error=held_out_error(option, {name: errors[name][best[name]] for name in {option, "dense"}}),
            held_out=held_out[option],
            intervals={name: _interval([values[place] for values in refitted]) for place, name in enumerate(names)},
            others=coefficients,
        )
    return Law(about, source, laws, left_out)


def _alike(held_out: Mapping[str, float]) -> list[str]:
    """Return the forms that predict what was left out about as well as the best one, which is among them."""
    return [form for form, error in held_out.items() if error <= ALIKE * min(held_out.values())]


def mean_cells(points: Sequence[Point]) -> Cells:
    """Return the mean loss over the seeds of each pair of parent's tokens and tokens."""
    losses: dict[tuple[float, float], list[float]] = defaultdict(list)
    for point in points:
        losses[point.parent_tokens, point.tokens].append(point.loss)
    return {key: statistics.fmean(values) for key, values in losses.items()}


def _fitted_to(form: str, option: str, means: Mapping[str, Cells]) -> Cells:
    """Select what a form of an option is fitted to: its mean losses, or what they differ from dense by."""
    return _both(means[option], means["dense"]) if form == RELATIVE else means[option]


def _both(cells: Cells, dense: Cells) -> Cells:
    """Return differences to dense, where both are."""
    return {key: loss - dense[key] for key, loss in cells.items() if key in dense}


def _fit(form: str, cells: Cells, start: Array | None = None) -> _Fit:
    """Return the least squares: over exponents by search, over amplitudes and E, which are not negative, exactly."""
    keys, loss = np.array(list(cells)), np.array(list(cells.values()))
    ln1, ln2 = np.log(np.maximum(keys[:, 0], 1)), np.log(keys[:, 1])

    def solved(exponents: Array) -> tuple[Array, Array]:
        terms = FORMS[form].terms(exponents, ln1, ln2)
        sizes = np.array([max(float(np.max(term)), 1e-300) for term in terms] + [1.0])
        basis = np.stack([*terms, np.ones_like(loss)], axis=1) / sizes
        amplitudes, *_ = np.linalg.lstsq(basis, loss, rcond=None)
        if form != RELATIVE and amplitudes.min() < 0:
            amplitudes, _ = nnls(basis, loss)
        return amplitudes / sizes, basis @ amplitudes - loss

    if not FORMS[form].exponents:
        return _Fit(form, np.zeros(0), solved(np.zeros(0))[0], 0.0)
    best = None
    for first in _starts(form, cells) if start is None else [start]:
        inside = np.clip(first, -_LIMIT, _LIMIT)
        found = least_squares(lambda values: solved(values)[1], inside, bounds=(-_LIMIT, _LIMIT), x_scale="jac")
        if best is None or found.cost < best.squares:
            best = _Fit(form, found.x, solved(found.x)[0], float(found.cost))
    assert best is not None
    return best


def _starts(form: str, cells: Cells) -> list[Array]:
    fixed = [0.0] if form in ("interaction", "sum") else []  # c, and the logarithm of w
    free = len(FORMS[form].exponents) - len(fixed)
    starts = [np.array([*values, *fixed]) for values in itertools.product(_STARTS, repeat=free)]
    return [*starts, np.array([*_fit("product", cells).exponents, 0.0])] if form == "interaction" else starts


def _held_out_errors(
    source: str, option: str, means: Mapping[str, Cells], others: Mapping[str, Mapping[str, Cells]]
) -> dict[str, Cells]:
    """Return each form's errors on parents that are left out, one after the other, by cell.

    Of an upcycled model they are errors of its difference to `dense`: a parent that was trained luckily moves both. Of
    an option without a parent, each number of tokens is left out.
    """
    cells = means[option]
    place = 0 if any(parent for parent, _ in cells) else 1
    groups, tokens = sorted({key[place] for key in cells}), {key[1] for key in cells}
    if place == 0 and (len(groups) < LEAST_PARENTS or not _determined(cells)):
        raise UpcycleError(
            f"{source}: {option}",
            got=f"{len({key[0] for key in cells})} parents x {len(tokens)} numbers of tokens",
            expected="4 parents x 2 numbers of tokens, or 3 x 3",
            fix="train more of them, or remove the option's rows",
        )
    differences = _both(cells, means["dense"]) if option.startswith("upcycled") else None
    if differences is not None and len({parent for parent, _ in differences}) < LEAST_PARENTS:
        raise UpcycleError(
            f"{source}: {option}",
            got=f"{len(differences)} trainings of a parent and a number of tokens that dense has too",
            expected="those of at least 3 parents",
            fix="train dense on as many tokens after the same parents",
        )
    errors: dict[str, Cells] = {}
    for form in _determined(cells) if place == 0 else FROM_NOTHING:
        errors[form] = _left_out(form, cells, place)
    if differences is not None:
        dense = others["dense"]  # like with like: a form of both models, or one of their difference
        errors = {form: {key: error[key] - dense[form][key] for key in differences} for form, error in errors.items()}
        errors[RELATIVE] = _left_out(RELATIVE, differences, place)
    return errors


def _determined(cells: Cells) -> list[str]:
    """Name the forms with fewer coefficients than there are cells without a parent's: others would fit anything."""
    parents = [parent for parent, _ in cells]
    left = len(cells) - max(parents.count(parent) for parent in parents)
    return [form for form in WITH_PARENT if len(FORMS[form].coefficients) < left]


def _left_out(form: str, cells: Cells, place: int) -> Cells:
    """Return a form's errors where all cells of a parent (place 0), or a number of tokens (1), are left out."""
    errors: Cells = {}
    for group in {key[place] for key in cells}:
        fitted = _fit(form, {key: value for key, value in cells.items() if key[place] != group})
        errors |= {key: fitted.loss(*key) - value for key, value in cells.items() if key[place] == group}
    return errors


def _root_mean_square(errors: Cells) -> float:
    return math.sqrt(statistics.fmean(value**2 for value in errors.values()))


def held_out_error(option: str, errors: Mapping[str, Cells]) -> float:
    """Return half of the 90 % interval of an option's held-out differences to `dense`; of dense, of its losses."""
    parts = [option] if option == "dense" or option.startswith("upcycled") else list(errors)
    own = errors[option]
    groups = len({key[0] for key in own} if any(key[0] for key in own) else own)
    return float(student_t.ppf(0.95, groups - 1)) * math.hypot(*(_root_mean_square(errors[part]) for part in parts))


def drawn_means(by_option: Mapping[str, Sequence[Point]], number: int) -> dict[str, Cells]:
    """Return means over seeds drawn with replacement: in each cell the same seeds for all options.

    Deviations from the mean are enlarged, for n seeds, by sqrt(n / (n - 1)): drawn from few they are too small.
    """
    random = np.random.default_rng(number)
    losses: dict[tuple[float, float], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for option, points in by_option.items():
        for point in points:
            losses[point.parent_tokens, point.tokens][option][point.seed] = point.loss
    drawn: dict[str, Cells] = defaultdict(dict)
    for key in sorted(losses):
        uniform = random.random(size=max(len(seeds) for seeds in losses[key].values()))
        for option, by_seed in losses[key].items():
            values = [by_seed[seed] for seed in sorted(by_seed)]
            count = len(values)
            picked = statistics.fmean(values[int(place * count)] for place in uniform[:count])
            mean = statistics.fmean(values)
            drawn[option][key] = mean + math.sqrt(count / max(count - 1, 1)) * (picked - mean)
    return drawn


def _interval(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [quantile(ordered, 0.05), quantile(ordered, 0.95)]
