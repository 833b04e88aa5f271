"""Opens a dense checkpoint by its address."""

from __future__ import annotations

from pathlib import Path

from nemo_upcycle.architecture import DENSE_CLASSES
from nemo_upcycle.errors import CheckpointError, problem, unknown
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.sources.safetensors_folder import SafetensorsFolder


def open_dense(uri: str | Path) -> DenseSource:
    """Open a dense checkpoint for reading slices.

    Args:
        uri: a Hugging Face folder, as a plain path or as `hf:///absolute/path`.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or it is not a dense Llama-family model.

    Example:
        >>> with open_dense("hf:///models/Llama-3-8B") as dense:  # doctest: +SKIP
        ...     dense.architecture.num_layers
        32
    """
    scheme, separator, rest = str(uri).partition("://")
    if not separator:
        rest = scheme
    elif scheme != "hf":
        raise CheckpointError(unknown("address scheme", scheme, ["hf"]))
    path = Path(rest)
    if separator and not path.is_absolute():
        raise CheckpointError(
            problem(
                str(uri),
                got="a name on the hub",
                expected="a folder on this machine (hf:///absolute/path)",
                fix="import it first: the pipeline's import stage downloads hf://organisation/model",
            )
        )
    source = SafetensorsFolder(path)
    if source.architecture.hf_class not in DENSE_CLASSES:
        raise CheckpointError(
            problem(
                str(path),
                got=source.architecture.hf_class,
                expected=f"a dense model ({', '.join(DENSE_CLASSES)})",
                fix="give the dense parent",
            )
        )
    return source
