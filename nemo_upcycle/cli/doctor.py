"""`nemo-upcycle doctor`: show what is installed, which versions fit, and the commands that add what is missing."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_upcycle.cli.common import add_json, show
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.package_info import __version__


if TYPE_CHECKING:
    from packaging.requirements import Requirement

HELP = "what is installed, which versions fit, what is missing and the command that adds it"
_EXAMPLES = """example:
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
_OK, _MISSING, _WRONG = "ok", "missing", "does not fit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = _EXAMPLES
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Check the environment, show the result, and return the exit status.

    Raises:
        UpcycleError: the package itself is not installed, so its requirements are unknown.
    """
    libraries, gpus, engine = _libraries(), _gpus(), _data_engine()
    fixes = _activation() | _fixes(libraries, bool(gpus))
    if not engine and (clone := _clone()):
        fixes[f"make -C {shlex.quote(str(clone))} data-env"] = "preparing training data (nemo-upcycle data)"
    answer = {
        "nemo_upcycle": __version__,
        "python": {"version": platform.python_version(), "needs": metadata(_PACKAGE)["Requires-Python"]},
        "libraries": libraries,
        "gpus": gpus,
        "torch_for_cuda": _torch_cuda(),
        "data_engine": engine,
        "fixes": list(fixes),
    }
    broken = [one for one in libraries if one["state"] == _WRONG or (one["state"] == _MISSING and not one["extra"])]
    show(args, answer | {"fits": not broken}, _text(answer, fixes))
    return 1 if broken else 0


def _libraries() -> list[dict[str, Any]]:
    """Return every library that the package's metadata names, with its version and whether that fits."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in metadata(_PACKAGE).get_all("Requires-Dist") or []]
    except PackageNotFoundError:
        raise UpcycleError(
            _PACKAGE, got="not installed", expected="an installed package", fix="pip install -e . in its folder"
        ) from None
    found = []
    for extra in _extras():
        for one in requirements:
            mine = one.marker is None or one.marker.evaluate({"extra": extra})
            if not mine or (extra and one.marker is None) or one.name == _PACKAGE:
                continue
            found.append(_described(one, extra))
        if extra in _ALONE:
            found.append(_described(Requirement(_ALONE[extra]), extra))
    return found


def _extras() -> dict[str, str]:
    """Return the extras of this environment: NeMo and Megatron-Bridge need different releases of Megatron-Core."""
    has_bridge = _installed("megatron-bridge") is not None and _installed("nemo_toolkit") is None
    return {name: purpose for name, purpose in _EXTRAS.items() if name != ("nemo" if has_bridge else "bridge")}


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _described(one: Requirement, extra: str) -> dict[str, Any]:
    extras = f"[{','.join(sorted(one.extras))}]" if one.extras else ""
    installed = _installed(one.name)
    fits = installed is not None and one.specifier.contains(installed, prereleases=True)
    state = _OK if fits else _WRONG if installed else _MISSING
    return {
        "extra": extra,
        "name": one.name,
        "needs": str(one.specifier),
        "install": f"{one.name}{extras}{one.specifier}",
        "installed": installed,
        "state": state,
    }


def _in_container() -> bool:
    """Return whether this is one of NVIDIA's containers, whose torch, Megatron and Transformer Engine match."""
    return "NVIDIA_PYTORCH_VERSION" in os.environ


def _activation() -> dict[str, str]:
    """Return the command that puts this environment on the PATH, if it is not there, and its purpose."""
    folder = Path(sys.prefix) / "bin"
    if sys.prefix == sys.base_prefix or str(folder) in os.environ.get("PATH", "").split(os.pathsep):
        return {}
    return {f"source {shlex.quote(str(folder / 'activate'))}": "finds nemo and nemo-upcycle"}


def _fixes(libraries: list[dict[str, Any]], has_gpus: bool) -> dict[str, str]:
    """Return one command for each extra that lacks something, and its purpose."""
    clone, pip = None if _in_container() else _clone(), f"{shlex.quote(sys.executable)} -m pip install"
    found = {}
    for extra, purpose in _extras().items():
        bad = [one for one in libraries if one["extra"] == extra and one["state"] != _OK]
        if _in_container():
            bad = [one for one in bad if one["state"] == _MISSING]
        if not bad or (extra == "gpu" and not has_gpus):
            continue
        if clone and extra not in _ALONE:
            what = "-e " + shlex.quote(f"{clone}[{extra}]" if extra else str(clone))
        else:
            what = shlex.join(one["install"] for one in bad)
        found[f"{pip} {what}"] = purpose
    return found


def _clone() -> Path | None:
    """Return the clone that `pip install -e` installed this package from; its extras are on no index."""
    folder = Path(__file__).parents[2]
    return folder if (folder / "pyproject.toml").is_file() else None


def _gpus() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def _data_engine() -> str | None:
    """Return the versions of the data engine in its own environment; None if it is not there or does not fit."""
    from nemo_upcycle.data.environment import data_python, engine_version

    try:
        return engine_version(data_python())
    except UpcycleError:
        return None


def _torch_cuda() -> str | None:
    """Return the CUDA version that torch was built for, without the slow import of torch."""
    spec = importlib.util.find_spec("torch")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        source = importlib.util.spec_from_file_location("_torch_version", f"{folder}/version.py")
        if source and source.loader:
            module = importlib.util.module_from_spec(source)
            source.loader.exec_module(module)
            return getattr(module, "cuda", None)
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
    cuda = answer["torch_for_cuda"]
    lines.append("GPUs: " + (", ".join(answer["gpus"]) or "none; the CPU backend trains small models"))
    lines.append("torch: " + (f"built for CUDA {cuda}" if cuda else "built without CUDA, or not installed"))
    lines.append(
        "data: " + (answer["data_engine"] or "no environment for nemo-upcycle data; docs/data.md says how to make one")
    )
    own = [one["name"] for one in answer["libraries"] if one["state"] == _WRONG] if _in_container() else []
    lines += [f"{name} is the container's own: choose a container that fits, see docs/install.md" for name in own]
    lines += ["to fix or to add:", *(f"  {fix}  # {purpose}" for fix, purpose in fixes.items())] if fixes else []
    return "\n".join(lines if fixes or own else [*lines, "all fits"])
