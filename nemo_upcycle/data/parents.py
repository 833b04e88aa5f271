"""What a user names as a model, and where that lies on this machine: one way for every command, stage and recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nemo_upcycle.errors import CheckpointError, UpcycleError
from nemo_upcycle.utils.cache import writable_cache
from nemo_upcycle.utils.files import is_complete


_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
WANTED = ["*.safetensors", "*.json", "tokenizer*", "merges.txt", "*.jinja"]
WANTED += ["README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"]  # for the card of what is made of the model
OF_TOKENIZER = ["*.json", "tokenizer*", "merges.txt"]
# subfolders hold other formats of the same weights (original/, onnx/), as does consolidated.safetensors; of the
# subfolders' files only additional_chat_templates/*.jinja are wanted
_UNWANTED = ["*/*.safetensors", "*/*.json", "tokenizer*/*", "consolidated*"]


class Parent(NamedTuple):
    """What the user names as a model.

    Attributes:
        kind: `asset`, `hub` (a name there), `nemo` (a NeMo or Megatron checkpoint) or `folder`.
        name: of the asset, on the hub, or the path.
    """

    kind: str
    name: str


def find_parent(source: str, *, nemo: bool = False) -> Parent:
    """Return what an address names. Every command, stage and recipe finds its models here; nothing is fetched.

    Args:
        source: `asset://NAME`, `hf://ORG/NAME`, plain `ORG/NAME`, a folder as a plain path, `hf:///absolute/path` or
            `nemo:///absolute/path`.
        nemo: whether a NeMo or Megatron checkpoint will do.

    Raises:
        UpcycleError: there is no such scheme or asset, or such a folder (CheckpointError).

    Example:
        >>> find_parent("hf://meta-llama/Meta-Llama-3-8B")
        Parent(kind='hub', name='meta-llama/Meta-Llama-3-8B')
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
        return Parent("asset", rest)
    elif scheme == "nemo" and nemo:
        return Parent("nemo", rest)
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
        return Parent("folder", str(path))
    is_mistyped = not scheme and path.parent.is_dir()  # models/lama beside models/llama is no name on the hub
    if is_mistyped or not _HUB_NAME.fullmatch(rest):
        raise CheckpointError(
            f"model {rest!r}",
            got="no such folder",
            expected="a Hugging Face folder, hf://ORG/NAME or asset://NAME",
            fix="check the path",
        )
    return Parent("hub", rest)


def on_this_machine(
    parent: Parent, wanted: Sequence[str] = WANTED, *, offline: bool = False, cache: Path | None = None
) -> Path:
    """Return the folder of a model: of an asset in the cache, of one on the hub downloaded.

    Args:
        parent: the model.
        wanted: patterns of the files to download from the hub.
        offline: whether to take what the hub's cache has, without asking whether that is all.
        cache: the hub's cache; None: that of the environment.

    Raises:
        UpcycleError: it cannot be made or downloaded.
    """
    if parent.kind == "asset":
        if is_complete(made := cached_asset(parent.name)):
            return made
        from nemo_upcycle.data.dense import ensure_dense  # imports torch

        return ensure_dense(f"asset://{parent.name}")
    return _download(parent.name, wanted, offline, cache) if parent.kind == "hub" else Path(parent.name)


def cached_asset(name: str) -> Path:
    """Return the folder in which the cache keeps a model of an asset, made or not; beside it lies a lock."""
    return writable_cache("dense") / re.sub(r"\W+", "-", name).strip("-")


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


def configuration_folder(source: str, *, nemo: bool = False) -> Path:
    """Return a folder with a model's `config.json`, without the weights of one on the hub; or a checkpoint's.

    Args:
        source: as in `find_parent`; the path of a `config.json` too.
        nemo: whether a NeMo or Megatron checkpoint will do.

    Raises:
        UpcycleError: it cannot be reached, or names nothing.
    """
    if (path := Path(source).expanduser()).name == "config.json" and path.is_file():
        return path.parent
    return on_this_machine(find_parent(source, nemo=nemo), ["config.json"])
