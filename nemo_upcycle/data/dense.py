"""From what the user names to a dense Hugging Face folder on this machine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from nemo_upcycle.data.parents import OF_TOKENIZER, cached_asset, find_parent, on_this_machine
from nemo_upcycle.errors import CheckpointError, UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import check_parent
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.sources import open_dense
from nemo_upcycle.sources.checks import check_source
from nemo_upcycle.sources.megatron_checkpoint import is_megatron
from nemo_upcycle.utils.files import is_complete


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def import_dense(source: str, output: Path, *, sampled: bool = False, offline: bool = False) -> Path:
    """Return a local folder that holds the dense model `source`, making or downloading it where needed.

    Args:
        source: `asset://NAME` (a model of `nemo_upcycle.demo`, converted into `output`), `hf://ORG/NAME` or
            plain `ORG/NAME` (the Hugging Face hub, kept in the hub's own cache, which resumes downloads), or
            a local folder, plain or as `hf:///absolute/path` (used where it lies).
        output: where a converted model goes. Untouched when nothing is converted.
        sampled: as in `check_source`.
        offline: whether to take what the hub's cache has, without asking whether that is all.

    Returns:
        A folder with `config.json`, safetensors and tokenizer files, checked to be a whole dense Llama-family model.

    Raises:
        UpcycleError: the source cannot be reached, or is not such a model (CheckpointError).

    Example:
        >>> import_dense("asset://smollm2-135m", Path("runs/demo/dense"))  # doctest: +SKIP
    """
    parent = find_parent(source)
    if parent.kind == "asset":
        from nemo_upcycle.demo.assets import ASSETS, fetch_asset
        from nemo_upcycle.demo.gguf import convert_gguf

        folder = convert_gguf(fetch_asset(parent.name), output, base_model=ASSETS[parent.name].base_model)
    else:
        folder = on_this_machine(parent, offline=offline)
    # Opening reads the configuration and every header, and checks that no file is cut short.
    with open_dense(folder) as dense:
        check_source(dense, sampled=sampled)
    require_tokenizer(folder)
    return folder


def check_address(source: str, *, whole: bool = False) -> Architecture | None:
    """Check what the user names as dense model, as far as that takes no time: a folder is opened, nothing is fetched.

    Args:
        source: as in `import_dense`.
        whole: whether a folder has to hold weights and tokenizer: a configuration alone says what a run would be.

    Returns:
        The architecture of a folder's model; None for what is still to be fetched.

    Raises:
        UpcycleError: there is no such scheme, asset or folder, or the folder is not such a model (CheckpointError).
    """
    parent = find_parent(source)
    if parent.kind != "folder":
        return None
    if not whole and is_configuration(Path(parent.name)):
        architecture = read_architecture(Path(parent.name))
        check_parent(architecture, parent.name)
        return architecture
    require_tokenizer(Path(parent.name))
    with open_dense(parent.name) as dense:
        return dense.architecture


def is_configuration(folder: Path) -> bool:
    """Return whether a folder holds a model's configuration and no weights, whatever their format."""
    weights = ("*.safetensors*", "*.bin*", "*.pt*", "*.gguf")
    return (folder / "config.json").is_file() and not any(True for kind in weights for _ in folder.glob(kind))


def require_tokenizer(folder: Path) -> None:
    """Check that `folder` holds a tokenizer; without one, transformers guesses from the path's name.

    Raises:
        CheckpointError: it does not.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(
            f"tokenizer in {folder}",
            got="none",
            expected=f"one of {', '.join(_TOKENIZER_FILES)}",
            fix="copy the model's tokenizer files into the folder",
        )


def tokenizer_folder(source: str) -> Path:
    """Return a folder with tokenizer and configuration of a dense model, without the weights of one on the hub.

    Args:
        source: as in `import_dense`.

    Raises:
        UpcycleError: it cannot be reached, or has no tokenizer (CheckpointError).
    """
    folder = on_this_machine(find_parent(source), OF_TOKENIZER)
    require_tokenizer(folder)
    return folder


def local_parent(source: str) -> Architecture | None:
    """Return the architecture of a dense model that lies on this machine; None for what is still to be fetched.

    Args:
        source: as in `import_dense`, or a NeMo or Megatron checkpoint, which need not hold a tokenizer.

    Raises:
        UpcycleError: there is no such thing, or it is not such a model (CheckpointError).
    """
    if not source.startswith("nemo://") and not is_megatron(Path(source)):
        return check_address(source)
    with open_dense(source) as dense:
        return dense.architecture


def read_parent(source: str) -> Architecture:
    """Return the architecture of a dense model; of one on the hub only configuration and tokenizer are fetched.

    Args:
        source: as in `local_parent`.

    Raises:
        UpcycleError: it cannot be reached, or is not such a model (CheckpointError).
    """
    return local_parent(source) or read_architecture(tokenizer_folder(source))


def ensure_dense(source: str) -> Path:
    """Return the folder of a dense model, keeping in the cache what has to be made or fetched first.

    Several ranks may call it at the same time: one of a node makes or fetches the folder, the others wait. They ask
    the hub for nothing that is there: hundreds of ranks that asked for every file would be turned away.

    Args:
        source: as in `import_dense`.

    Example:
        >>> ensure_dense("asset://smollm2-135m")  # doctest: +SKIP
        PosixPath('/home/me/.cache/nemo-upcycle/dense/smollm2-135m')
    """
    kind, name = find_parent(source)
    if kind not in ("asset", "hub"):  # used where it lies
        return import_dense(source, Path(), sampled=True)
    output = cached_asset(name)
    with FileLock(f"{output}.lock"):
        if kind == "asset":
            return output if is_complete(output) else import_dense(source, output, sampled=True)
        if int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0):
            with suppress(UpcycleError):  # the first one has not come this far: then this one fetches it
                return import_dense(source, Path(), sampled=True, offline=True)
        return import_dense(source, Path(), sampled=True)


def local_model(source: str, *, nemo: bool = False) -> str:
    """Return where a model lies on this machine, fetching what a name on the hub or of an asset stands for.

    Unlike `ensure_dense` it asks for no tokenizer and takes MoE models too; who opens the path checks what is there.

    Args:
        source: as in `find_parent`.
        nemo: whether a NeMo or Megatron checkpoint will do; its address stays as it is.

    Raises:
        UpcycleError: it cannot be reached, or names nothing.

    Example:
        >>> local_model("hf:///models/Llama-3-8B")  # doctest: +SKIP
        '/models/Llama-3-8B'
    """
    parent = find_parent(source, nemo=nemo)
    return source if parent.kind == "nemo" else str(on_this_machine(parent))
