"""Run a Hugging Face folder in the installed transformers, beside its parent, and write the result into the folder.

The model is loaded as its card says. The model first runs in its own type, which shows whether this release of
transformers can run the model. Then the model runs in float32, and its logits are compared with the parent's logits.
If a model is large, only its first layers run.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch

from nemo_upcycle.convert.compared_logits import TOLERANCE
from nemo_upcycle.convert.model_card import add_section
from nemo_upcycle.convert.pictures import with_picture
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.compatibility import load_options
from nemo_upcycle.models.hf_model import errors_only, load_as_written, load_model, unknown_because
from nemo_upcycle.models.mapping import mapping_of
from nemo_upcycle.sources.safetensors_folder import SafetensorsFolder
from nemo_upcycle.utils.dtypes import dtype_name
from nemo_upcycle.utils.files import MODEL_MARKER, read_json, write_json
from nemo_upcycle.utils.memory import free_memory_bytes
from nemo_upcycle.utils.progress import ProgressLine
from nemo_upcycle.utils.writers import plain


#: Number of random tokens.
TOKENS = 64
#: Largest number of parameters to run. If a model is larger, only its first layers run.
SAMPLE_PARAMS = 10**9
Outcome = Literal["equal", "different", "ran", "failed", "not run"]
_SEED = 11
_FUNCTION = "the parent's function"
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Proof:
    """The result of running a folder.

    Args:
        outcome: "equal" or "different" (compared with the parent in float32), "ran" (without a parent), "failed" (with
            an error), or "not run" (because this machine or this release cannot load the model).
        release: release of transformers, such as "transformers 5.24.0".
        hf_class: class that was loaded.
        dtype: type of the folder.
        tokens: number of random tokens.
        layers: number of layers that ran, counted from the first layer.
        num_layers: number of layers of the model.
        tolerance: largest difference that counts as equal.
        files_sha256: hash of config.json and of the names, sizes and headers of the weight files.
        reason: why the model failed or was not run; "" if it ran.
        expert_kernel: how this release multiplies the experts: "eager", "grouped_mm" or "loop" (transformers 4).
        picture: whether a random picture was among the tokens.
        difference: norm of the difference between the logits of the model and its parent in float32, divided by the
            norm of the parent's logits; None without a comparison.
        own_difference: like `difference`, but the model computes in the dtype of the folder's weights.
        parent_difference: like `difference`, but between the parent in this dtype and the parent in float32.
    """

    outcome: Outcome
    release: str
    hf_class: str
    dtype: str
    tokens: int
    layers: int
    num_layers: int
    tolerance: float
    files_sha256: str
    reason: str = ""
    expert_kernel: str = ""
    picture: bool = False
    difference: float | None = None
    own_difference: float | None = None
    parent_difference: float | None = None

    @property
    def text(self) -> str:
        """The result in words. The words do not say whether a difference is expected."""
        if self.outcome in ("failed", "not run"):
            return f"{'does not run' if self.outcome == 'failed' else 'not run'} in {self.release}: {self.reason}"
        where = f"in {self.release}, on {self.tokens} random tokens{' and a picture' if self.picture else ''}"
        if self.layers < self.num_layers:
            where += f", through {self.layers} of {self.num_layers} layers"
        if self.difference is None:
            return f"runs {where}"
        verdict = "computes" if self.outcome == "equal" else "does not compute"
        found = f"{self.difference:.2g} of their norm in float32 (allowed: {self.tolerance:g})"
        if self.dtype != "float32":
            found += (
                f", and by {self.own_difference:.2g} in {self.dtype}, in which the parent's own logits differ by "
                f"{self.parent_difference:.2g}"
            )
        return f"{verdict} {_FUNCTION}: {where}, its logits differ by {found}"


def prove(folder: Path, parent: Path | None, *, sample_params: int = SAMPLE_PARAMS) -> Proof:
    """Run a Hugging Face folder on random tokens, and compare it with its parent.

    Args:
        folder: folder to run.
        parent: Hugging Face folder of the parent; None if the model need not compute its parent's function.
        sample_params: largest number of parameters to run. If the model is larger, only its first layers run.

    Returns:
        The result, even if the model fails or cannot be run.

    Example:
        >>> prove(Path("models/Llama-3-8B-E8T2"), Path("models/Llama-3-8B")).outcome  # doctest: +SKIP
        'equal'
    """
    version = metadata.version("transformers") if find_spec("transformers") else ""
    config = read_json(folder / "config.json")
    with SafetensorsFolder(folder) as opened:
        arch, files, params = opened.architecture, opened.fingerprint(), _params_of_layers(opened)
        dtype = opened.dtype(mapping_of("embedding", arch).hf[0])
    layers = _layers_to_run(params, arch, sample_params)
    result = partial(
        Proof,
        release=f"transformers {version}".rstrip(),
        hf_class=config["architectures"][0],
        dtype=dtype_name(dtype),
        tokens=TOKENS,
        layers=layers,
        num_layers=arch.num_layers,
        tolerance=TOLERANCE,
        files_sha256=hashlib.sha256(json.dumps([config, files], sort_keys=True).encode()).hexdigest(),
    )
    if not version:
        return result(outcome="not run", reason="it is not installed")
    if reason := unknown_because(folder, arch.hf_class) or _too_large_because(
        sum(params[n] for n in range(-1, layers)), dtype
    ):
        return result(outcome="not run", reason=reason)
    options = load_options(arch, dtype.itemsize) if int(version.split(".")[0]) >= 5 else {}
    try:
        with ProgressLine(f"run {folder.name}", 2 if parent else 1) as line, errors_only(), torch.no_grad():
            return _run(folder, parent, layers if layers < arch.num_layers else None, options, result, line)
    except UpcycleError as error:  # this release does not know the parent
        return result(outcome="not run", reason=error.problem)
    except Exception as error:  # transformers and torch raise many types of errors
        first_line = next(iter(str(error).strip().splitlines()), "")
        return result(outcome="failed", reason=f"{type(error).__name__}: {first_line}")


def record(folder: Path, proof: Proof, expected: str = "") -> None:
    """Write the result into the folder's marker and onto its model card. A folder of another program stays as it is.

    Args:
        folder: folder of the model.
        proof: result of `prove`.
        expected: why the model differs from its parent; "" if it should compute the parent's function.
    """
    path = folder / MODEL_MARKER
    if not path.is_file():
        return
    write_json(path, read_json(path) | {"proof": asdict(proof)})
    add_section(folder, "Checked", plain(f"{said(proof, expected)}."))


def said(proof: Proof | None, expected: str = "") -> str:
    """Return the result in a sentence without a period, for the console and the card.

    Args:
        proof: result of `prove`; None if the model was not run.
        expected: why the model differs from its parent; "" if it should compute the parent's function.
    """
    if proof is None:
        return f"Not run. It should {'differ from its parent: ' + expected if expected else f'compute {_FUNCTION}'}"
    text = proof.text[:1].upper() + proof.text[1:]
    if expected:
        compared = proof.outcome in ("equal", "different")
        text += f". {'A difference is expected' if compared else 'It should differ from its parent'}: {expected}"
    return text


def _params_of_layers(folder: SafetensorsFolder) -> Counter[int]:
    """Return the number of parameters of every layer. The key -1 stands for all parameters outside the layers."""
    found: Counter[int] = Counter()
    for name in folder.names():
        layer = _LAYER.search(name)
        found[int(layer[1]) if layer else -1] += math.prod(folder.shape(name))
    return found


def _layers_to_run(params: Counter[int], arch: Architecture, sample_params: int) -> int:
    """Return how many of the first layers to run: at least one layer with experts, if the model has experts."""
    sums = accumulate(params[layer] for layer in range(-1, arch.num_layers))
    fitting = sum(total <= sample_params for total in list(sums)[1:])
    first = next((layer for layer in range(arch.num_layers) if arch.is_moe_layer(layer)), 0)
    return max(fitting, first + 1)


def _too_large_because(params: int, dtype: torch.dtype) -> str:
    """Return why a number of parameters does not fit into memory, in their own type and in float32; "" if they fit."""
    needed_bytes, free_bytes = params * (4 + dtype.itemsize), free_memory_bytes()
    if free_bytes is None or needed_bytes <= free_bytes:
        return ""
    return f"{needed_bytes / 2**30:.1f} GiB of memory are needed, and {free_bytes / 2**30:.1f} GiB are free"


def _run(
    folder: Path,
    parent: Path | None,
    layers: int | None,
    options: Mapping[str, str],
    result: Callable[..., Proof],
    line: ProgressLine,
) -> Proof:
    """Run the folder and its parent one after the other, and return the result.

    Args:
        folder: folder to run.
        parent: folder of the parent, or None.
        layers: number of layers to run; None runs all.
        options: arguments of `from_pretrained` on the folder's card.
        result: makes the result from its outcome and differences.
        line: progress display, advanced after each model.

    Raises:
        Exception: transformers cannot run a model. The type of the exception depends on the release.
    """
    model = load_as_written(folder, layers, dtype="auto", **options)
    own, inputs = model.dtype, _inputs(model.config)
    kernel = getattr(model.config, "_experts_implementation", None) or "loop"
    result = partial(result, expert_kernel=kernel, picture="pixel_values" in inputs)
    own_BSV, child_BSV = _logits(model, inputs), _logits(model.float(), inputs)
    del model  # before the parent is loaded
    line.advance(note="MoE model")
    if not (own_BSV.isfinite().all() and child_BSV.isfinite().all()):
        return result(outcome="failed", reason="its logits are NaN or infinite")
    if parent is None:
        return result(outcome="ran")
    load = load_as_written if "pixel_values" in inputs else load_model
    rounded_BSV, parent_BSV = (
        _logits(load(parent, layers, dtype=dtype).eval(), inputs) for dtype in (own, torch.float32)
    )
    line.advance(note="parent")
    difference, own_difference, parent_difference = (
        float((logits_BSV - parent_BSV).norm() / parent_BSV.norm()) for logits_BSV in (child_BSV, own_BSV, rounded_BSV)
    )
    return result(
        outcome="equal" if difference <= TOLERANCE else "different",
        difference=difference,
        own_difference=own_difference,
        parent_difference=parent_difference,
    )


def _logits(model: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a model's logits [B, S, V] in float32; a picture is first rounded to the model's type."""
    given = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    logits_BSV: torch.Tensor = model(**given, use_cache=False).logits.float()
    return logits_BSV


def _inputs(config: Any) -> dict[str, torch.Tensor]:
    """Return random tokens as arguments of a model's `forward`, with a picture if the model takes pictures."""
    special = {value for key, value in config.to_dict().items() if "token" in key and isinstance(value, int)}
    usable = [token for token in range(config.get_text_config().vocab_size) if token not in special]
    picked = torch.randint(len(usable), (TOKENS,), generator=torch.Generator().manual_seed(_SEED))
    tokens_S = torch.tensor(usable)[picked]
    if (inputs := with_picture(tokens_S, config)) is not None:
        return inputs
    ids_BS = tokens_S.view(2, -1)
    return {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS)}
