"""The results of running each Hugging Face class in each release of transformers and in each server.

The rows are in `conf/compatibility`, a file for each runtime. `python -m benchmarks.compatibility` runs the models and
writes the results. `convert`, the model card, the errors and docs/classes.md put the rows into words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Any, Literal

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.stacked import EAGER, needs_eager_experts
from nemo_upcycle.utils.conf import packaged, packaged_names, read_yaml


FOLDER = "compatibility"
#: Word in a row of the table that stands for every class.
ANY = "any"
QWEN3_VL = "Qwen3VLMoeForConditionalGeneration"
Result = Literal["same", "option", "other", "refused", "not run"]
#: Result -> words for the user. After the words, a message shows the row's reason or option.
WORDS: Mapping[Result, str] = {
    "same": "",
    "option": "",
    "other": "its tokens differ from the parent's",
    "refused": "it does not run this model",
    "not run": "not tried",
}


@dataclass(frozen=True)
class Written:
    """Facts about a written model that decide the limits of the model.

    Args:
        arch: architecture of the text model.
        itemsize: size of a number in the folder (bytes).
        wrapper: class around the text model; "" without other parts.
    """

    arch: Architecture
    itemsize: int
    wrapper: str = ""


#: Name of a property that some runtime does not support -> whether a model has this property.
PROPERTIES: Mapping[str, Callable[[Written], bool]] = {
    "dense layers": lambda model: model.arch.moe_pattern is not None,
    "softmax before top-k": lambda model: not model.arch.norm_topk,
    "softmax after top-k": lambda model: model.arch.norm_topk and model.arch.top_k != model.arch.num_experts,
    "scaled rotary frequencies": lambda model: model.arch.rope_scaling is not None,
    "another activation than SiLU": lambda model: model.arch.activation != "silu",
    "a bias of the attention's output": lambda model: model.arch.attention_out_bias,
    "several shared experts": lambda model: model.arch.shared_ffn_size > (model.arch.expert_ffn_size or 0),
    "expert rows of an uneven size": lambda model: has_uneven_rows(model.arch, model.itemsize),
    "another vision tower than Qwen3-VL's": lambda model: model.wrapper not in ("", QWEN3_VL),
    "a class of transformers 5 around it": lambda model: model.wrapper.startswith(("HyperCLOVAXVision", "MiniCPM")),
    "InternVL around it": lambda model: model.wrapper.startswith("InternVL"),
}


def has_uneven_rows(arch: Architecture, itemsize: int) -> bool:
    """Return whether the experts' rows have lengths for which transformers 5 cannot multiply all experts at once."""
    widths = (arch.hidden_size, arch.expert_ffn_size or 0) if arch.num_experts else ()
    return needs_eager_experts(widths, itemsize)


def load_options(arch: Architecture, itemsize: int) -> dict[str, str]:
    """Return the arguments that `from_pretrained` of transformers 5 needs for a folder of this model.

    Args:
        arch: architecture of the model.
        itemsize: size of a number in the folder (bytes).
    """
    return {"experts_implementation": EAGER} if has_uneven_rows(arch, itemsize) else {}


def option_text(options: Mapping[str, str]) -> str:
    """Return arguments as they are written in Python.

    Example:
        >>> option_text({"experts_implementation": "eager"})
        'experts_implementation="eager"'
    """
    return ", ".join(f'{name}="{value}"' for name, value in options.items())


@dataclass(frozen=True)
class Row:
    """The result of running a class in a runtime.

    Args:
        hf_class: class, or `any`.
        result: result of the run.
        where: property that a model must have; "" for all models of the class.
        because: reason, limit or option, in words.
        date: day on which the result was measured; "" if it comes from the runtime's source code.
    """

    hf_class: str
    result: Result
    where: str = ""
    because: str = ""
    date: str = ""

    def holds(self, model: Written) -> bool:
        """Return whether the row is about a model."""
        return self.hf_class in (ANY, model.arch.hf_class) and (not self.where or PROPERTIES[self.where](model))

    @property
    def words(self) -> str:
        """The result in words for the user."""
        return ": ".join(part for part in (WORDS[self.result], self.because) if part)


@dataclass(frozen=True)
class Runtime:
    """A release that runs Hugging Face folders.

    Args:
        name: name for users, such as "vLLM" or "transformers 5".
        release: package and version that were run.
        command: command that runs all models in this release.
        rows: results, class by class.
    """

    name: str
    release: str
    command: str
    rows: tuple[Row, ...]

    def found(self, model: Written) -> list[Row]:
        """Return the rows about a model. If there are no such rows, return one row that says "not run"."""
        return [row for row in self.rows if row.holds(model)] or [Row(model.arch.hf_class, "not run")]


@lru_cache(maxsize=1)
def runtimes() -> tuple[Runtime, ...]:
    """Read the table."""
    return tuple(read_runtime(name) for name in packaged_names(FOLDER))


def read_runtime(name: str) -> Runtime:
    """Read a file of the table by its name."""
    content: dict[str, Any] = read_yaml(packaged(FOLDER) / f"{name}.yaml")
    rows = [Row(**{key: _text(value) for key, value in row.items()}) for row in content.pop("rows")]
    return Runtime(**content, rows=tuple(rows))


def _text(value: object) -> Any:
    return value.isoformat() if isinstance(value, date) else value


def caveats(model: Written) -> tuple[str, ...]:
    """Return the limits of a model as `RUNTIME: words`. Runtimes with the same limit share a text.

    A dense model has no limits.
    """
    said: dict[str, list[str]] = {}
    for runtime in runtimes() if model.arch.num_experts else ():
        for row in runtime.found(model):
            if row.result != "same":
                said.setdefault(row.words, []).append(runtime.name)
    return tuple(f"{', '.join(names)}: {words}" for words, names in said.items())


def releases_with(hf_class: str) -> Iterator[str]:
    """Yield the releases of transformers that run a class.

    Example:
        >>> list(releases_with("GraniteMoeSWAForCausalLM"))
        ['transformers 5.24.0']
    """
    for runtime in runtimes():
        has_class = any(row.hf_class == hf_class and row.result == "same" for row in runtime.rows)
        if has_class and runtime.name.startswith("transformers"):
            yield runtime.release
