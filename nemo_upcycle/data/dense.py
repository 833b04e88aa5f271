"""Find the model that a user names, or fetch it: one way for every command, stage and recipe.

What takes long to import is imported inside functions: commands that answer at once find their models here, too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from nemo_upcycle.errors import CheckpointError, UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import check_parent
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.tokenizer_files import check_tokenizer
from nemo_upcycle.utils.cache import writable_cache
from nemo_upcycle.utils.files import is_complete


_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
WANTED = ["*.safetensors", "*.json", "tokenizer*", "merges.txt", "*.jinja"]
WANTED += ["README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"]  # for the card of what is made of the model
OF_TOKENIZER = ["*.json", "tokenizer*", "merges.txt"]
# subfolders hold other formats of the same weights (original/, onnx/), as does consolidated.safetensors; of the
# subfolders' files only additional_chat_templates/*.jinja are wanted
_UNWANTED = ["*/*.safetensors", "*/*.json", "tokenizer*/*", "consolidated*"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


class ModelAddress(NamedTuple):
    """What the user names as a model.

    Attributes:
        kind: `asset`, `hub` (a name there), `nemo` (a NeMo or Megatron checkpoint) or `folder`.
        name: the asset's, that on the hub, or the path.
    """

    kind: str
    name: str


def find_parent(source: str, *, nemo: bool = False) -> ModelAddress:
    """Find the model that an address names. Every command, stage and recipe finds its models here; nothing is fetched.

    Args:
        source: `asset://NAME`, `hf://ORG/NAME`, plain `ORG/NAME`, a folder as a plain path, `hf:///absolute/path` or
            `nemo:///absolute/path`.
        nemo: whether a NeMo or Megatron checkpoint will do.

    Raises:
        UpcycleError: there is no such scheme or asset, or such a folder (CheckpointError).

    Example:
        >>> find_parent("hf://meta-llama/Meta-Llama-3-8B")
        ModelAddress(kind='hub', name='meta-llama/Meta-Llama-3-8B')
    """
    if source in ("", "hf://", "nemo://"):
        raise UpcycleError("model", got="an empty name", expected="a folder or hf://ORG/NAME", fix="name one")
    scheme, separator, rest = source.partition("://")
    if not separator:
        scheme, rest = "", source
    elif scheme == "asset":
        from nemo_upcycle.demo.assets import ASSETS

        models = [key for key, asset in ASSETS.items() if asset.kind == "model"]
        if rest not in models:
            raise UpcycleError.unknown("model asset", rest, models)
        return ModelAddress("asset", rest)
    elif scheme == "nemo" and nemo:
        return ModelAddress("nemo", rest)
    elif scheme == "nemo":
        raise CheckpointError(
            source,
            got="a NeMo or Megatron checkpoint",
            expected="a Hugging Face folder, hf://ORG/NAME or asset://NAME",
            fix="export it to Hugging Face's format first, with NeMo's llm.export_ckpt",
        )
    elif scheme != "hf":
        raise UpcycleError.unknown("address scheme", scheme, ("asset", "hf", "nemo"))
    path = Path(rest).expanduser()
    if path.is_dir():
        return ModelAddress("folder", str(path))
    is_mistyped = not scheme and path.parent.is_dir()  # models/lama beside models/llama is no name on the hub
    if is_mistyped or not _HUB_NAME.fullmatch(rest):
        raise CheckpointError(
            f"model {rest!r}",
            got="no such folder",
            expected="a Hugging Face folder, hf://ORG/NAME or asset://NAME",
            fix="check the path",
        )
    return ModelAddress("hub", rest)


def on_this_machine(
    parent: ModelAddress, wanted: Sequence[str] = WANTED, *, offline: bool = False, cache: Path | None = None
) -> Path:
    """Return the folder of a model: of an asset in the cache, of one on the hub downloaded.

    Args:
        parent: the model.
        wanted: patterns of the files to download from the hub.
        offline: whether to take what the hub's cache has, without asking whether that is all.
        cache: the hub's cache; None: that of the environment.

    Raises:
        UpcycleError: the model cannot be made or downloaded.
    """
    if parent.kind == "asset":
        if is_complete(made := cached_asset(parent.name)):
            return made
        return ensure_dense(f"asset://{parent.name}")
    return _download(parent.name, wanted, offline, cache) if parent.kind == "hub" else Path(parent.name)


def cached_asset(name: str) -> Path:
    """Return the folder in which the cache keeps a model of an asset, made or not; beside it lies a lock."""
    return writable_cache("dense") / re.sub(r"\W+", "-", name).strip("-")


def import_dense(source: str, output: Path, *, sampled: bool = False, offline: bool = False) -> Path:
    """Return a local folder that holds the dense model `source`, making or downloading it where needed.

    Args:
        source: `asset://NAME` (a model of `nemo_upcycle.demo`, converted into `output`), `hf://ORG/NAME` or
            plain `ORG/NAME` (the Hugging Face hub, kept in the hub's own cache, which resumes downloads), or
            a local folder, plain or as `hf:///absolute/path` (used where it lies).
        output: folder for a converted model; untouched when nothing is converted.
        sampled: whether to read samples of the weights only, see `check_source`.
        offline: whether to take what is in the hub's cache without asking the hub whether it is complete.

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
    from nemo_upcycle.sources import open_dense
    from nemo_upcycle.sources.checks import check_source

    # Opening reads the configuration and every header, and checks that no file is cut short.
    with open_dense(folder) as dense:
        check_source(dense, sampled=sampled)
    require_tokenizer(folder)
    return folder


def check_address(source: str, *, whole: bool = False) -> Architecture | None:
    """Check the address of a dense model quickly: open a folder, fetch nothing.

    Args:
        source: address of the model, see `import_dense`.
        whole: whether a folder must hold weights and tokenizer; a configuration is enough to show what a run would do.

    Returns:
        The architecture of a folder's model; None for a model that is still to be fetched.

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
    from nemo_upcycle.sources import open_dense

    with open_dense(parent.name) as dense:
        return dense.architecture


def is_configuration(folder: Path) -> bool:
    """Return whether a folder holds a model's configuration and no weights, whatever their format."""
    weights = ("*.safetensors*", "*.bin*", "*.pt*", "*.gguf")
    return (folder / "config.json").is_file() and not any(True for kind in weights for _ in folder.glob(kind))


def require_tokenizer(folder: Path) -> None:
    """Check that `folder` holds a tokenizer that opens; without one, transformers guesses from the path's name.

    Raises:
        CheckpointError: it does not, or the file is damaged.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(
            f"tokenizer in {folder}",
            got="none",
            expected=f"one of {', '.join(_TOKENIZER_FILES)}",
            fix="copy the model's tokenizer files into the folder",
        )
    check_tokenizer(folder)


def tokenizer_folder(source: str) -> Path:
    """Return a folder with a dense model's tokenizer and configuration; no weights are fetched from the hub.

    Args:
        source: address of the model, see `import_dense`.

    Raises:
        UpcycleError: the model cannot be reached, or has no tokenizer (CheckpointError).
    """
    folder = on_this_machine(find_parent(source), OF_TOKENIZER)
    require_tokenizer(folder)
    return folder


def local_parent(source: str) -> Architecture | None:
    """Return the architecture of a dense model that lies on this machine; None for one that is still to be fetched.

    Args:
        source: address of the model, see `import_dense`; or a NeMo or Megatron checkpoint, with or without tokenizer.

    Raises:
        UpcycleError: there is no such thing, or it is not such a model (CheckpointError).
    """
    from nemo_upcycle.sources import open_dense
    from nemo_upcycle.sources.megatron_checkpoint import is_megatron

    if not source.startswith("nemo://") and not is_megatron(Path(source)):
        return check_address(source)
    with open_dense(source) as dense:
        return dense.architecture


def read_parent(source: str) -> Architecture:
    """Return the architecture of a dense model; only configuration and tokenizer are fetched from the hub.

    Args:
        source: address of the model, see `local_parent`.

    Raises:
        UpcycleError: the model cannot be reached, or is not such a model (CheckpointError).
    """
    return local_parent(source) or read_architecture(tokenizer_folder(source))


def ensure_dense(source: str) -> Path:
    """Return the folder of a dense model; one that has to be made or fetched is kept in the cache.

    Several ranks may call it at the same time: one of a node makes or fetches the folder, the others wait. They do not
    ask the hub about files that are there: it would turn hundreds of such ranks away.

    Args:
        source: address of the model, see `import_dense`.

    Example:
        >>> ensure_dense("asset://smollm2-135m")  # doctest: +SKIP
        PosixPath('/home/me/.cache/nemo-upcycle/dense/smollm2-135m')
    """
    from filelock import FileLock

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
    """Return the path of a model on this machine; fetch a model of the hub, make an asset.

    Unlike `ensure_dense` it needs no tokenizer and takes MoE models too; the caller checks what the path holds.

    Args:
        source: address of the model, see `find_parent`.
        nemo: whether a NeMo or Megatron checkpoint will do; its address is returned as it is.

    Raises:
        UpcycleError: the model cannot be reached, or `source` names nothing.

    Example:
        >>> local_model("hf:///models/Llama-3-8B")  # doctest: +SKIP
        '/models/Llama-3-8B'
    """
    parent = find_parent(source, nemo=nemo)
    return source if parent.kind == "nemo" else str(on_this_machine(parent))


def configuration_folder(source: str, *, nemo: bool = False) -> Path:
    """Return a folder with a model's `config.json`, or a checkpoint's folder; no weights are fetched from the hub.

    Args:
        source: address of the model, see `find_parent`; or the path of a `config.json`.
        nemo: whether a NeMo or Megatron checkpoint will do.

    Raises:
        UpcycleError: the model cannot be reached, or `source` names nothing.
    """
    if (path := Path(source).expanduser()).name == "config.json" and path.is_file():
        return path.parent
    return on_this_machine(find_parent(source, nemo=nemo), ["config.json"])


def _download(name: str, wanted: Sequence[str], offline: bool, cache: Path | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UpcycleError(
            "package huggingface-hub", got="not installed", expected="any", fix="pip install huggingface_hub"
        ) from None
    try:
        folder = snapshot_download(
            name,
            allow_patterns=list(wanted),
            ignore_patterns=_UNWANTED,
            local_files_only=offline,
            cache_dir=cache,
        )
        return Path(folder)
    except Exception as error:  # huggingface_hub hands on those of its HTTP client
        if isinstance(error, OSError) and error.filename:
            raise UpcycleError(
                f"the hub's cache, {error.filename}",
                got=error.strerror,
                expected="a folder to write, with room",
                fix="set HF_HOME to one",
            ) from None
        answers = [getattr(one, "response", None) for one in (error, error.__cause__)]
        status = next((answer.status_code for answer in answers if answer is not None), None)
        token = "give this machine a token that has access: `hf auth login`, or HF_TOKEN in the environment"
        expected = "a folder of that name, or a model on the hub (hf://ORG/NAME) that this machine can reach"
        if status in (401, 403):  # a gated model, or a private one, which the hub says it does not have
            expected = "access to it"
            fix = f"check the name; of a gated model accept the terms on its page, then {token}"
        else:
            fix = (
                f"check the name and the network; of a gated or private model {token}; or run `hf download {name}"
                " --local-dir FOLDER` on a machine with a network and give that folder; or try asset://smollm2-135m"
            )
        raise UpcycleError(
            f"download of {name} from the Hugging Face hub",
            got=f"{type(error).__name__}: {str(error).strip().splitlines()[0].rstrip('.')}",
            expected=expected,
            fix=fix,
        ) from None
