"""From what the user names to a dense Hugging Face folder on this machine."""

from __future__ import annotations

import re
from pathlib import Path

from filelock import FileLock

from nemo_upcycle.data.assets import ASSETS, fetch_asset, writable_cache
from nemo_upcycle.data.gguf import convert_gguf
from nemo_upcycle.errors import CheckpointError, UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.sources import open_dense
from nemo_upcycle.sources.checks import check_source
from nemo_upcycle.utils.files import is_complete


_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = ["*.safetensors", "*.json", "tokenizer*", "merges.txt", "*.jinja"]
_WANTED += ["README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"]  # for the card of what is made of the model
_OF_TOKENIZER = ["*.json", "tokenizer*", "merges.txt"]
# subfolders hold other formats of the same weights (original/, onnx/), as does consolidated.safetensors; of theirs
# only additional_chat_templates/*.jinja is wanted
_UNWANTED = ["*/*.safetensors", "*/*.json", "tokenizer*/*", "consolidated*"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def import_dense(source: str, output: Path) -> Path:
    """Return a local folder that holds the dense model `source`, making or downloading it where needed.

    Args:
        source: `asset://NAME` (a model of `nemo_upcycle.data.assets`, converted into `output`), `hf://ORG/NAME` or
            plain `ORG/NAME` (the Hugging Face hub, kept in the hub's own cache, where a broken download goes on), or
            a local folder, plain or as `hf:///absolute/path` (used where it lies).
        output: where a converted model goes. Untouched when nothing is converted.

    Returns:
        A folder with `config.json`, safetensors and tokenizer files, checked to be a whole dense Llama-family model.

    Raises:
        UpcycleError: the source cannot be reached, or is not such a model (CheckpointError).

    Example:
        >>> import_dense("asset://smollm2-135m", Path("runs/demo/dense"))  # doctest: +SKIP
    """
    return _import(source, output, sampled=False)


def _import(source: str, output: Path, *, sampled: bool) -> Path:
    scheme, rest = _address(source)
    if scheme == "asset":
        _require_model(rest)
        folder = convert_gguf(fetch_asset(rest), output, base_model=ASSETS[rest].base_model)
    else:
        folder = _from_hf(rest, may_be_path=not scheme)
    # Opening reads the configuration and every header, and checks that no file is cut short.
    with open_dense(folder) as dense:
        check_source(dense, sampled=sampled)
    require_tokenizer(folder)
    return folder


def _address(source: str, schemes: tuple[str, ...] = ("asset", "hf")) -> tuple[str, str]:
    """Return the scheme of an address, empty without one, and what it names."""
    scheme, separator, rest = source.partition("://")
    if not separator:
        return "", source
    if scheme not in schemes:
        raise UpcycleError.unknown("address scheme", scheme, schemes)
    return scheme, rest


def check_address(source: str) -> Architecture | None:
    """Check what the user names as dense model, as far as that takes no time: a folder is opened, nothing is fetched.

    Args:
        source: as in `import_dense`.

    Returns:
        The architecture of a folder's model; None for what is still to be fetched.

    Raises:
        UpcycleError: there is no such scheme, asset or folder, or the folder is not such a model (CheckpointError).
    """
    scheme, rest = _address(source)
    if scheme == "asset":
        _require_model(rest)
    elif folder := _folder(rest, may_be_path=not scheme):
        require_tokenizer(folder)
        with open_dense(folder) as dense:
            return dense.architecture
    return None


def _require_model(name: str) -> None:
    models = [key for key, asset in ASSETS.items() if asset.kind == "model"]
    if name not in models:
        raise UpcycleError.unknown("model asset", name, models)


def _from_hf(rest: str, *, may_be_path: bool) -> Path:
    return _folder(rest, may_be_path=may_be_path) or _download(rest)


def _folder(rest: str, *, may_be_path: bool) -> Path | None:
    """Return the folder that an address names; None for what can only be a name on the hub."""
    path = Path(rest).expanduser()
    if path.is_dir():
        return path
    is_mistyped = may_be_path and path.parent.is_dir()  # models/lama beside models/llama is no name on the hub
    if is_mistyped or not _HUB_NAME.fullmatch(rest):
        raise CheckpointError(
            f"model {rest!r}",
            got="no such folder",
            expected="a Hugging Face folder, hf://ORG/NAME or asset://NAME",
            fix="check the path",
        )
    return None


def _download(name: str, wanted: list[str] = _WANTED) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UpcycleError(
            "package huggingface-hub", got="not installed", expected="any", fix="pip install huggingface_hub"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=_UNWANTED))
    except Exception as error:  # huggingface_hub hands on those of its HTTP client
        if isinstance(error, OSError) and error.filename:
            raise UpcycleError(
                f"the hub's cache, {error.filename}",
                got=error.strerror,
                expected="a folder to write, with room",
                fix="set HF_HOME to one",
            ) from None
        raise UpcycleError(
            f"download of {name} from the Hugging Face hub",
            got=f"{type(error).__name__}: {str(error).strip().splitlines()[0].rstrip('.')}",
            expected="a folder of that name, or a model on the hub (hf://ORG/NAME) that this machine can reach",
            fix=(
                "check the name, the network and (for a gated model) `hf auth login`; or run `hf download "
                f"{name} --local-dir FOLDER` on a machine with a network and give that folder; or try "
                "asset://smollm2-135m"
            ),
        ) from None


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
    scheme, rest = _address(source)
    if scheme == "asset":
        return ensure_dense(source)
    folder = _folder(rest, may_be_path=not scheme) or _download(rest, _OF_TOKENIZER)
    require_tokenizer(folder)
    return folder


def ensure_dense(source: str) -> Path:
    """Return the folder of a dense model, keeping in the cache what has to be made or fetched first.

    Several ranks may call it at the same time: one makes the folder, the others wait.

    Args:
        source: as in `import_dense`.

    Example:
        >>> ensure_dense("asset://smollm2-135m")  # doctest: +SKIP
        PosixPath('/home/me/.cache/nemo-upcycle/dense/smollm2-135m')
    """
    scheme, name = _address(source)
    if scheme != "asset":  # used where it lies, or kept by the hub's client, which has its own locks
        return _import(source, Path(), sampled=True)
    output = cached_asset(name)
    with FileLock(f"{output}.lock"):
        return output if is_complete(output) else _import(source, output, sampled=True)


def cached_asset(name: str) -> Path:
    """Return the folder in which the cache keeps a model of an asset, made or not."""
    return writable_cache("dense") / re.sub(r"\W+", "-", name).strip("-")


def local_model(source: str) -> str:
    """Return where a model lies on this machine, fetching what a name on the hub or of an asset stands for.

    Unlike `ensure_dense` it asks for no tokenizer, and leaves paths to who opens them.

    Args:
        source: `hf://ORG/NAME` or `ORG/NAME`, dense or MoE; `asset://NAME`; a path, or one with `hf://` or `nemo://`.

    Raises:
        UpcycleError: it cannot be reached, or names nothing.

    Example:
        >>> local_model("/models/Llama-3-8B")
        '/models/Llama-3-8B'
    """
    if not source:
        raise UpcycleError("model", got="an empty name", expected="a folder or hf://ORG/NAME", fix="name one")
    scheme, rest = _address(source, ("asset", "hf", "nemo"))
    if scheme == "asset":
        return str(ensure_dense(source))
    if scheme == "hf" and not rest.startswith("/"):
        return str(_from_hf(rest, may_be_path=False))
    if not scheme and _HUB_NAME.fullmatch(rest):
        return str(_from_hf(rest, may_be_path=True))
    return source
