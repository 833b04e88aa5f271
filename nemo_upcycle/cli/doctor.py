"""`nemo-upcycle doctor`: show what is installed, which versions fit, and the commands that add what is missing.

It runs on the standard library alone: whoever needs it may have installed nothing else.
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
from nemo_upcycle.trainers.bridge import FITS, NEWER, RELEASES, TOO_OLD, fit_of, newer_release
from nemo_upcycle.utils.requirements import Requirement, installed_release, requirement, value_in


EPILOG = """example:
  nemo-upcycle doctor

exit status: 0 what is installed fits; 1 something does not, or a library that everything needs is missing."""
_PACKAGE = "nemo-upcycle"
#: extra -> its purpose
_EXTRAS = {
    "": "reading, converting and verifying weights",
    "nemo": "training",
    "bridge": "training in Megatron-Bridge",
    "verify": "comparing logits",
    "eval": "evaluation and the report's figures",
    "demo": "the demo's model",
    "gpu": "FP8 and grouped GEMM on NVIDIA GPUs; NVIDIA's NeMo container has it",
}
#: Libraries without an extra: NeMo installs them. 4.56 is the first whose `from_pretrained` takes `dtype`.
_ALONE = {"verify": "transformers>=4.56"}
#: What has to be of other releases than in NVIDIA's containers. Python finds what lies in a folder of PYTHONPATH
#: first, so nothing of the container is changed.
_LAID_OVER = ("megatron-core", "nvidia-modelopt", "filelock")
#: Libraries that nothing imports: the package names them for their bound alone.
_ONLY_BOUNDED = ("grpcio-tools", "ml-dtypes")
_OK, _OWN, _NEWER, _MISSING, _WRONG = "ok", "the container's", "newer", "missing", "does not fit"
#: Release of Megatron-Bridge -> NVIDIA's container nvcr.io/nvidia/nemo that has it, and what trains there;
#: docker/README.md has all that is in each.
_CONTAINERS = {
    "0.2": ("25.11", "nemo"),
    "0.3": ("26.02", "nemo"),
    "0.4": ("26.04", "bridge"),
    "0.5": ("26.06", "bridge"),
    "0.6": ("26.08", "bridge"),
    "0.7": ("26.10", "bridge"),
}
#: the containers that docker/Dockerfile.nemo and docker/Dockerfile.bridge build on
_BASES = {"nemo": "26.02", "bridge": "26.08"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--data-requirements",
        action="store_true",
        help="print what pip installs for nemo-upcycle data, in an environment of its own, and stop",
    )
    parser.add_argument(
        "--missing", action="store_true", help="print what pip would have to add for the whole chain, and stop"
    )


def run(args: argparse.Namespace) -> int:
    """Check the environment, show the result, and return the exit status.

    Raises:
        UpcycleError: the package itself is not installed, so its requirements are unknown.
    """
    if args.data_requirements:
        show(args, {"requirements": _data_requirements()}, "\n".join(_data_requirements()))
        return 0
    libraries = _libraries()
    if args.missing:
        missing = [one["install"] for one in _missing(libraries)]
        show(args, {"requirements": missing}, "\n".join(missing))
        return 0
    gpus, engine, (container, _) = _gpus(), _data_engine(), _container()
    fixes = _activation() | (_container_fixes(libraries) if _in_container() else _fixes(libraries, bool(gpus)))
    if not engine:
        fixes[_data_command()] = "preparing training data (nemo-upcycle data)"
    answer = {
        "nemo_upcycle": __version__,
        "python": {"version": platform.python_version(), "needs": metadata(_PACKAGE)["Requires-Python"]},
        "libraries": libraries,
        "container": container,
        "gpus": gpus,
        "torch_for_cuda": value_in("torch", "version.py", "cuda"),
        "data_engine": engine,
        "fixes": list(fixes),
    }
    unfit = [one for one in libraries if one["state"] == _WRONG or (one["state"] == _MISSING and not one["extra"])]
    show(args, answer | {"fits": not unfit}, _text(answer, fixes))
    return 1 if unfit else 0


def _libraries() -> list[dict[str, Any]]:
    """Return every library that the package's metadata names, with its version and whether that fits."""
    requirements, libraries = _requirements(), []
    for extra in _extras():
        libraries += [_described(one) for one in requirements if one.extra == extra and one.name != _PACKAGE]
        if extra in _ALONE:
            libraries.append(_described(requirement(_ALONE[extra])._replace(extra=extra)))
    return libraries


def _requirements() -> list[Requirement]:
    try:
        return [requirement(line) for line in metadata(_PACKAGE).get_all("Requires-Dist") or []]
    except PackageNotFoundError:
        raise UpcycleError(
            _PACKAGE, got="not installed", expected="an installed package", fix="pip install -e . in its folder"
        ) from None


def _extras() -> dict[str, str]:
    """Return the extras of this environment: NeMo and Megatron-Bridge need different releases of Megatron-Core."""
    has_bridge = _installed("megatron-bridge") is not None and _installed("nemo_toolkit") is None
    trainer = _container()[1] or ("bridge" if has_bridge else "nemo")
    return {name: purpose for name, purpose in _EXTRAS.items() if name not in {"nemo", "bridge"} - {trainer}}


def _installed(package: str) -> str | None:
    if package == "transformer-engine" and not _has_torch_binding():
        return None
    return installed_release(package)


def _has_torch_binding() -> bool:
    """Return whether Transformer Engine has what binds it to torch, which pip installs only when asked to.

    Without it neither NeMo nor Megatron-Bridge can be imported where the package itself is there.
    """
    spec, binding = importlib.util.find_spec("transformer_engine"), "transformer_engine_torch*.so"
    folders = map(Path, (spec.submodule_search_locations or []) if spec else [])
    return any([*folder.rglob(binding), *folder.parent.glob(binding)] for folder in folders)


def _described(one: Requirement) -> dict[str, Any]:
    installed = _installed(one.name)
    state = _MISSING if installed is None else _OK if one.allows(installed) else _WRONG
    if one.name == RELEASES.name and installed:  # the start of a training asks the same
        state = {FITS: _OK, NEWER: _NEWER, TOO_OLD: _WRONG}[fit_of(installed)]
    if state == _WRONG and _container()[0] in _BASES.values() and one.name not in _LAID_OVER:
        state = _OWN
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


def _container() -> tuple[str | None, str | None]:
    """Return which of NVIDIA's NeMo containers this is and what trains in it; None for what is not known."""
    bridge = _installed("megatron-bridge") if _in_container() else None
    return _CONTAINERS.get(".".join((bridge or "").split(".")[:2]), (None, None))


def _activation() -> dict[str, str]:
    """Return the command that puts this environment on the PATH, if it is not there, and its purpose."""
    folder = Path(sys.prefix) / "bin"
    if sys.prefix == sys.base_prefix or str(folder) in os.environ.get("PATH", "").split(os.pathsep):
        return {}
    return {f"source {shlex.quote(str(folder / 'activate'))}": "finds nemo and nemo-upcycle"}


def _missing(libraries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the libraries that are not installed; Transformer Engine, which needs a compiler, is not asked for."""
    return [
        one
        for one in libraries
        if one["state"] == _MISSING and one["extra"] != "gpu" and one["name"] not in _ONLY_BOUNDED
    ]


def _fixes(libraries: list[dict[str, Any]], has_gpus: bool) -> dict[str, str]:
    """Return one command for each extra that lacks something, and its purpose."""
    clone, pip = _clone(), f"{shlex.quote(sys.executable)} -m pip install"
    fixes = {}
    for extra, purpose in _extras().items():
        bad = [one for one in libraries if one["extra"] == extra and one["state"] not in (_OK, _NEWER)]
        if not bad or (extra == "gpu" and not has_gpus):
            continue
        if clone and extra not in _ALONE:
            what = "-e " + shlex.quote(f"{clone}[{extra}]" if extra else str(clone))
        else:
            what = shlex.join(one["install"] for one in bad)
        fixes[f"{pip} {what}"] = purpose
    return fixes


def _container_fixes(libraries: list[dict[str, Any]]) -> dict[str, str]:
    """Return the commands that put what a container lacks into a folder before its own, and their purposes."""
    python = shlex.quote(sys.executable)
    pip = f"PIP_CONSTRAINT= {python} -m pip install --prefix in-container"
    wrong = [one["install"] for one in libraries if one["name"] in _LAID_OVER and one["state"] == _WRONG]
    fixes = {}
    if wrong and _container()[0] in _BASES.values():
        fixes[f"{pip} --ignore-installed --no-deps {shlex.join(wrong)}"] = "other releases than the container's"
    if missing := [one["install"] for one in _missing(libraries)]:
        fixes[f"{pip} -c <({python} -m pip list --format=freeze) {shlex.join(missing)}"] = "the rest of the chain"
    if fixes:
        site = f"$PWD/in-container/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        path = f'export PYTHONPATH="{site}${{PYTHONPATH:+:$PYTHONPATH}}"'
        fixes[path] = "finds these before the container's, of which nothing is replaced"
    return fixes


def _data_requirements() -> list[str]:
    return [one.argument for one in _requirements() if one.extra == "data"]


def _data_command() -> str:
    """Return the command that makes the environment of the data engine, where `data_python` looks for it."""
    if clone := _clone():
        return f"make -C {shlex.quote(str(clone))} data-env"
    folder = Path(sys.prefix).parent / ".venv-data"
    pip = shlex.quote(str(folder / "bin/pip"))
    return (
        f"{shlex.quote(sys.executable)} -m venv {shlex.quote(str(folder))}"
        f" && {pip} install {shlex.join(_data_requirements())}"
        f" && {pip} install --no-deps {shlex.quote(_where_from())}"
    )


def _where_from() -> str:
    """Find what pip installed this package from: a wheel, a folder; its name, where pip kept no address."""
    source = json.loads(distribution(_PACKAGE).read_text("direct_url.json") or "{}")
    if not source or "vcs_info" in source:
        return f"{_PACKAGE}=={__version__}"
    return str(source["url"]).removeprefix("file://")


def _clone() -> Path | None:
    """Return the clone that `pip install -e` installed this package from; its extras are on no index."""
    folder = Path(__file__).parents[2]
    return folder if (folder / "pyproject.toml").is_file() else None


def _gpus() -> list[str]:
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def _data_engine() -> str | None:
    """Return the versions of the data engine in its own environment; None if it is not there or does not fit."""
    try:
        return engine_version(data_python())
    except UpcycleError:
        return None


def _text(answer: dict[str, Any], fixes: dict[str, str]) -> str:
    python = answer["python"]
    lines = [f"nemo-upcycle {answer['nemo_upcycle']}, Python {python['version']} (needs {python['needs']})"]
    for extra, purpose in _extras().items():
        lines.append(f"{extra or 'base'}: {purpose}")
        for one in answer["libraries"]:
            if one["extra"] == extra:
                installed = one["installed"] or "-"
                lines.append(f"  {one['name']:<24}{installed:<20}{one['state']:<14}{one['needs']}")
    cuda, has_torch = answer["torch_for_cuda"], _installed("torch") is not None
    lines.append("GPUs: " + (", ".join(answer["gpus"]) or "none; the CPU backend trains small models"))
    lines.append(
        "torch: " + (f"built for CUDA {cuda}" if cuda else "built without CUDA" if has_torch else "not installed")
    )
    lines.append("data: " + (answer["data_engine"] or "no environment for nemo-upcycle data"))
    if _in_container():
        lines.append("container: " + _advice())
    lines += [
        f"{one['name']} {one['installed']} is the container's own, and {one['needs']} is what was tested: it stays"
        for one in answer["libraries"]
        if one["state"] == _OWN
    ]
    lines += [newer_release(one["installed"]) for one in answer["libraries"] if one["state"] == _NEWER]
    lines += ["to fix or to add:", *(f"  {fix}  # {purpose}" for fix, purpose in fixes.items())] if fixes else []
    fits = all(one["state"] in (_OK, _MISSING) for one in answer["libraries"])
    return "\n".join([*lines, "all fits"] if fits and not fixes else lines)


def _advice() -> str:
    """Return which container this is, and which Dockerfile adds what it lacks, or which container to take instead."""
    release, trainer = _container()
    name = f"nvcr.io/nvidia/nemo:{release}" if release else "one of NVIDIA's, but none that is known"
    if release in _BASES.values():
        return f"{name}; docker/Dockerfile.{trainer} adds what it lacks"
    if release and trainer == "bridge" and fit_of(_installed(RELEASES.name) or "") != TOO_OLD:
        return f"{name}, in which this package has not run; docker/Dockerfile.bridge builds on {_BASES['bridge']}"
    return f"{name}; take {_BASES['nemo']} for NeMo 2.7, {_BASES['bridge']} for Megatron-Bridge (docker/README.md)"
