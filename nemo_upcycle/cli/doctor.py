"""`nemo-upcycle doctor`: list libraries, check versions, and print the command that installs missing libraries.

The command needs only the standard library, because its users may have installed nothing else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution, metadata
from pathlib import Path
from typing import Any

from nemo_upcycle.cli.common import show
from nemo_upcycle.data.environment import data_python, engine_version
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.package_info import __version__
from nemo_upcycle.trainers.bridge import FITS, NEWER, RELEASES, TOO_OLD, fit_of
from nemo_upcycle.utils.requirements import Requirement, installed_release, requirement, value_in


EPILOG = """example:
  nemo-upcycle doctor

exit status: 0 all versions fit; 1 a version does not fit, or a required library is missing."""
_PACKAGE = "nemo-upcycle"
#: extra -> its purpose
_EXTRAS = {
    "": "reading, converting and verifying weights",
    "nemo": "training",
    "bridge": "training in Megatron-Bridge",
    "eval": "evaluation and the report's figures",
    "demo": "the demo's model",
    "gpu": "FP8 and grouped GEMM on NVIDIA GPUs; NVIDIA's NeMo container has it",
}
#: Libraries that docker/Dockerfile.nemo installs in place of the container's releases.
_LAID_OVER = ("megatron-core", "nvidia-modelopt")
#: Libraries whose release must fit even in a container. All other libraries stay as the container has them.
_NEEDED = (*_LAID_OVER, "nemo-toolkit", RELEASES.name)
#: Libraries that nothing imports. The package requires them only to limit their versions.
_ONLY_BOUNDED = ("grpcio-tools", "ml-dtypes")
_OK, _OWN, _NEWER, _MISSING, _WRONG = "ok", "the container's", "newer", "missing", "does not fit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--data-requirements",
        action="store_true",
        help="print only the requirements of nemo-upcycle data, which has its own environment",
    )
    parser.add_argument(
        "--missing", action="store_true", help="print only the requirements that are missing for the whole chain"
    )


def run(args: argparse.Namespace) -> int:
    """Check the environment, show the result, and return the exit status.

    Raises:
        UpcycleError: the package itself is not installed, so its requirements are unknown.
    """
    libraries = _libraries()
    if args.data_requirements or args.missing:
        asked = _data_requirements() if args.data_requirements else _missing(libraries)
        show(args, {"requirements": asked}, "\n".join(asked))
        return 0
    gpus, engine = _gpus(), _data_engine()
    answer = {
        "nemo_upcycle": __version__,
        "python": {"version": platform.python_version(), "needs": metadata(_PACKAGE)["Requires-Python"]},
        "libraries": libraries,
        "gpus": gpus,
        "torch_for_cuda": value_in("torch", "version.py", "cuda"),
        "data_engine": engine,
        "fixes": [*_library_fixes(libraries, bool(gpus)), *([] if engine else [_data_command()])],
    }
    fits = not any(one["state"] == _WRONG or (one["state"] == _MISSING and not one["extra"]) for one in libraries)
    show(args, answer | {"fits": fits}, _text(answer))
    return int(not fits)


def _requirements() -> list[Requirement]:
    try:
        return [requirement(line) for line in metadata(_PACKAGE).get_all("Requires-Dist") or []]
    except PackageNotFoundError:
        raise UpcycleError(
            _PACKAGE, kind="missing", got="is not installed", fix="run `pip install -e .` in its folder"
        ) from None


def _libraries() -> list[dict[str, Any]]:
    """Describe Megatron-Bridge and each library in the package's metadata, and say whether the versions fit."""
    requirements = [*_requirements(), RELEASES._replace(extra="bridge")]
    other = "nemo" if _trainer() == "bridge" else "bridge"
    return [
        _described(one)
        for extra in _EXTRAS
        for one in requirements
        if one.extra == extra != other and one.name != _PACKAGE
    ]


def _trainer() -> str:
    """Return the trainer of this environment.

    An environment has one trainer, because NeMo and Megatron-Bridge need different releases of Megatron-Core.
    """
    has_bridge, has_nemo = (_installed(name) is not None for name in (RELEASES.name, "nemo-toolkit"))
    return "bridge" if has_bridge and not has_nemo else "nemo"


def _installed(package: str) -> str | None:
    if package == "transformer-engine" and not _has_torch_binding():
        return None
    return installed_release(package)


def _has_torch_binding() -> bool:
    """Return whether Transformer Engine has its binding to torch.

    pip installs the binding only on request. Without the binding, an installed Transformer Engine breaks the import of
    NeMo and Megatron-Bridge.
    """
    spec, binding = importlib.util.find_spec("transformer_engine"), "transformer_engine_torch*.so"
    folders = map(Path, (spec.submodule_search_locations or []) if spec else [])
    return any([*folder.rglob(binding), *folder.parent.glob(binding)] for folder in folders)


def _described(one: Requirement) -> dict[str, Any]:
    installed = _installed(one.name)
    if installed is None:
        state = _MISSING
    elif one.name == RELEASES.name:  # the same check as at the start of a training
        state = {FITS: _OK, NEWER: _NEWER, TOO_OLD: _WRONG}[fit_of(installed)]
    elif one.allows(installed):
        state = _OK
    else:
        state = _OWN if _in_container() and one.name not in _NEEDED else _WRONG
    return {
        "extra": one.extra,
        "name": one.name,
        "needs": one.bounds,
        "install": one.argument,
        "installed": installed,
        "state": state,
    }


def _in_container() -> bool:
    """Return whether this is one of NVIDIA's containers, whose torch, Megatron and Transformer Engine match."""
    return "NVIDIA_PYTORCH_VERSION" in os.environ


def _missing(libraries: list[dict[str, Any]]) -> list[str]:
    """Return the requirements that pip must add, without Transformer Engine, which needs a compiler."""
    return [
        one["install"]
        for one in libraries
        if one["state"] == _MISSING and one["extra"] != "gpu" and one["name"] not in _ONLY_BOUNDED
    ]


def _library_fixes(libraries: list[dict[str, Any]], has_gpus: bool) -> list[str]:
    """Return the command that adds libraries and, if there is a GPU, the command that builds Transformer Engine.

    In a container, return only the command that builds a new image.
    """
    if _in_container():
        trainer, wrong = _trainer(), any(one["state"] == _WRONG for one in libraries)
        image = f"docker build -f docker/Dockerfile.{trainer} -t nemo-upcycle:{trainer} ."
        return [image] if wrong or _missing(libraries) else []
    pip = f"{shlex.quote(sys.executable)} -m pip install"
    bad = [one for one in libraries if one["state"] in (_MISSING, _WRONG)]
    plain = [one["install"] for one in bad if one["extra"] != "gpu"]
    for_gpus = [one["install"] for one in bad if one["extra"] == "gpu" and has_gpus]
    return [f"{pip} {shlex.join(names)}" for names in (plain, for_gpus) if names]


def _data_requirements() -> list[str]:
    return [one.argument for one in _requirements() if one.extra == "data"]


def _data_command() -> str:
    """Return the command that creates the data engine's environment in the folder where `data_python` looks for it."""
    folder = Path(sys.prefix).parent / ".venv-data"
    pip = shlex.quote(str(folder / "bin/pip"))
    return (
        f"{shlex.quote(sys.executable)} -m venv {shlex.quote(str(folder))}"
        f" && {pip} install {shlex.join(_data_requirements())}"
        f" && {pip} install --no-deps {shlex.join(_where_from())}"
    )


def _where_from() -> list[str]:
    """Return the pip arguments that install this package from the same source (wheel, folder or git clone)."""
    clone = Path(__file__).parents[2]
    if (clone / "pyproject.toml").is_file():  # the metadata in a clone does not name the source
        return ["-e", str(clone)]
    source = json.loads(distribution(_PACKAGE).read_text("direct_url.json") or "{}")
    if not source:
        return [f"{_PACKAGE}=={__version__}"]
    if commit := source.get("vcs_info"):
        return [f"{commit['vcs']}+{source['url']}@{commit['commit_id']}"]
    return [source["url"].removeprefix("file://")]


def _gpus() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def _data_engine() -> str | None:
    """Return the versions of the data engine in its environment; None if the engine is missing or does not fit."""
    try:
        return engine_version(data_python())
    except UpcycleError:
        return None


def _text(answer: dict[str, Any]) -> str:
    python, libraries = answer["python"], answer["libraries"]
    lines = [f"nemo-upcycle {answer['nemo_upcycle']}, Python {python['version']} (needs {python['needs']})"]
    for extra in dict.fromkeys(one["extra"] for one in libraries):
        lines.append(f"{extra or 'base'}: {_EXTRAS[extra]}")
        for one in libraries:
            if one["extra"] == extra:
                lines.append(f"  {one['name']:<24}{one['installed'] or '-':<20}{one['state']:<17}{one['needs']}")
    cuda, has_torch = answer["torch_for_cuda"], _installed("torch") is not None
    built = f"built for CUDA {cuda}" if cuda else "built without CUDA" if has_torch else "not installed"
    lines.append("GPUs: " + (", ".join(answer["gpus"]) or "none; the CPU backend trains small models"))
    lines.append(f"torch: {built}")
    lines.append("data: " + (answer["data_engine"] or "no environment for nemo-upcycle data"))
    return "\n".join([*lines, *(["to fix or to add:", *answer["fixes"]] if answer["fixes"] else ["all fits"])])
