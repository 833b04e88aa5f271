"""Fetch the model that an address names: from the hub, from an asset, or from a local folder.

Commands that must answer at once import this module, so it imports torch only inside functions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.sources.find import ModelAddress, Parent, find_parent, require_tokenizer
from nemo_upcycle.utils.cache import writable_cache
from nemo_upcycle.utils.files import is_complete
from nemo_upcycle.utils.locks import take_lock


WANTED = ["*.safetensors", "*.json", "tokenizer*", "merges.txt", "*.jinja"]
WANTED += ["README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"]  # for the model card of the upcycled model
OF_TOKENIZER = ["*.json", "tokenizer*", "merges.txt"]
# Subfolders (original/, onnx/) and consolidated.safetensors hold the same weights in other formats. Of all files in
# subfolders, only additional_chat_templates/*.jinja are wanted.
_UNWANTED = ["*/*.safetensors", "*/*.json", "tokenizer*/*", "consolidated*"]


def on_this_machine(
    parent: ModelAddress, wanted: Sequence[str] = WANTED, *, offline: bool = False, cache: Path | None = None
) -> Path:
    """Return the folder of a model. Convert an asset into the cache; download a model from the hub.

    Args:
        parent: address of the model.
        wanted: patterns of the files to download from the hub.
        offline: whether to use a complete cache of the hub without asking the hub.
        cache: folder of the hub's cache; None means the folder that the environment sets.

    Raises:
        UpcycleError: the model cannot be converted or downloaded.
    """
    if parent.kind == "asset":
        if is_complete(made := cached_asset(parent.name)):
            return made
        return ensure_dense(f"asset://{parent.name}")
    return _download(parent.name, wanted, offline, cache) if parent.kind == "hub" else Path(parent.name)


def cached_asset(name: str) -> Path:
    """Return the cache folder of an asset's model, converted or not. Its lock file lies beside the folder."""
    return writable_cache("dense") / re.sub(r"\W+", "-", name).strip("-")


def import_dense(source: str, output: Path, *, sampled: bool = False, offline: bool = False) -> Path:
    """Return a local folder that holds the dense model `source`. Convert or download the model if needed.

    Args:
        source: `asset://NAME` (a model of `nemo_upcycle.sources.demo`, converted into `output`), `hf://ORG/NAME` or
            plain `ORG/NAME` (the Hugging Face hub, kept in the hub's own cache, which resumes downloads), or a local
            folder, plain or as `hf:///absolute/path` (used in place).
        output: folder for a converted model; untouched if nothing is converted.
        sampled: whether to read only samples of the weights, see `check_source`.
        offline: whether to use a complete cache of the hub without asking the hub.

    Returns:
        A folder with `config.json`, safetensors and tokenizer files. The folder was checked: it holds a complete dense
        Llama-family model.

    Raises:
        UpcycleError: the source cannot be reached, or is not such a model (CheckpointError).

    Example:
        >>> import_dense("asset://smollm2-135m", Path("runs/demo/dense"))  # doctest: +SKIP
    """
    parent = find_parent(source)
    if parent.kind == "asset":
        from nemo_upcycle.sources.demo.assets import ASSETS, fetch_asset
        from nemo_upcycle.sources.demo.gguf import convert_gguf

        folder = convert_gguf(fetch_asset(parent.name), output, base_model=ASSETS[parent.name].base_model)
    else:
        folder = on_this_machine(parent, offline=offline)
    from nemo_upcycle.sources.checks import check_source
    from nemo_upcycle.sources.resolve import open_dense

    # Opening reads the configuration and every header, and checks that no file is truncated.
    with open_dense(folder) as dense:
        check_source(dense, sampled=sampled)
    require_tokenizer(folder)
    return folder


def tokenizer_folder(source: str) -> Path:
    """Return a folder with a dense model's tokenizer and configuration. No weights are fetched from the hub.

    Args:
        source: address of the model, see `import_dense`.

    Raises:
        UpcycleError: the model cannot be reached, or has no tokenizer (CheckpointError).
    """
    folder = on_this_machine(find_parent(source), OF_TOKENIZER)
    require_tokenizer(folder)
    return folder


def read_parent(parent: Parent) -> Architecture:
    """Return the architecture of a dense model. Only configuration and tokenizer are fetched from the hub.

    Args:
        parent: the dense model.

    Raises:
        UpcycleError: the model cannot be reached, or is not such a model (CheckpointError).
    """
    return parent.architecture or read_architecture(tokenizer_folder(parent.address))


def ensure_dense(source: str) -> Path:
    """Return the folder of a dense model. If it must be converted or downloaded, it is kept in the cache.

    Several ranks may call this function at the same time: one rank of each node converts or downloads the model, and
    the others wait. The others do not ask the hub about files that are already there, because the hub would refuse
    hundreds of such requests.

    Args:
        source: address of the model, see `import_dense`.

    Example:
        >>> ensure_dense("asset://smollm2-135m")  # doctest: +SKIP
        PosixPath('/home/me/.cache/nemo-upcycle/dense/smollm2-135m')
    """
    kind, name = find_parent(source)
    if kind not in ("asset", "hub"):  # a local folder is used in place
        return import_dense(source, Path(), sampled=True)
    output = cached_asset(name)
    with take_lock(Path(f"{output}.lock"), timeout_s=-1):
        if kind == "asset":
            return output if is_complete(output) else import_dense(source, output, sampled=True)
        if int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0):
            with suppress(UpcycleError):  # if the first rank has not fetched the model yet, this rank fetches it
                return import_dense(source, Path(), sampled=True, offline=True)
        return import_dense(source, Path(), sampled=True)


def local_model(source: str, *, nemo: bool = False) -> str:
    """Return the path of a model on this machine. Download a model from the hub; convert an asset.

    Unlike `ensure_dense`, this function needs no tokenizer and also accepts MoE models. The caller checks the contents
    of the path.

    Args:
        source: address of the model, see `find_parent`.
        nemo: whether a NeMo or Megatron checkpoint is accepted; its address is returned unchanged.

    Raises:
        UpcycleError: the model cannot be reached, or `source` names nothing.

    Example:
        >>> local_model("hf:///models/Llama-3-8B")  # doctest: +SKIP
        '/models/Llama-3-8B'
    """
    parent = find_parent(source, nemo=nemo)
    return source if parent.kind == "nemo" else str(on_this_machine(parent))


def configuration_folder(source: str, *, nemo: bool = False) -> Path:
    """Return a folder with a model's `config.json`, or a checkpoint's folder. No weights are fetched from the hub.

    Args:
        source: address of the model, see `find_parent`; or the path of a `config.json`.
        nemo: whether a NeMo or Megatron checkpoint is accepted.

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
            "huggingface-hub", kind="missing", got="is not installed", fix="run: pip install huggingface_hub"
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
    except Exception as error:  # huggingface_hub also raises errors of its HTTP client
        if isinstance(error, OSError) and error.filename:
            raise UpcycleError(
                f"Hub cache {error.filename}",
                kind="state",
                got=f"cannot be written: {error.strerror}",
                fix="set HF_HOME to a writable folder with enough free space",
            ) from None
        answers = [getattr(one, "response", None) for one in (error, error.__cause__)]
        status = next((answer.status_code for answer in answers if answer is not None), None)
        token = "give this machine a token that has access: `hf auth login`, or HF_TOKEN in the environment"
        if status in (401, 403):  # a gated or private model; the hub says that a private model does not exist
            fix = f"check the name. If the model is gated, accept the terms on its page, then {token}"
        else:
            fix = (
                f"check the name and the network. If the model is gated or private, {token}. Or run `hf download "
                f"{name} --local-dir FOLDER` on a machine with a network and give that folder. Or try asset://smollm2-135m"
            )
        raise UpcycleError(
            f"Download of {name} from the Hugging Face hub",
            kind="state",
            got=f"failed ({type(error).__name__}: {str(error).strip().splitlines()[0].rstrip('.')})",
            fix=fix,
        ) from None
