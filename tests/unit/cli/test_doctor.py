"""`nemo-upcycle doctor`: what it finds, and that each of its fixes is a command that works on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from nemo_upcycle.cli import doctor
from nemo_upcycle.utils import requirements
from tests.unit.cli.conftest import Command, refused


ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without GPUs, outside of containers, its environment activated, the one for data beside it."""
    monkeypatch.setattr(doctor, "_gpus", list)
    monkeypatch.setattr(doctor, "_data_engine", lambda: "nemo-upcycle 0.2.0, datatrove 0.10.1")
    monkeypatch.delenv("NVIDIA_PYTORCH_VERSION", raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}")


def _without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def installed(name: str) -> str:
        if name in names:
            raise requirements.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(requirements, "version", installed)


def _has_core(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    """Let the sources of Megatron-Core say that they are of a release."""
    said = requirements.value_in
    has = {"megatron.core": release}
    monkeypatch.setattr(requirements, "value_in", lambda name, *rest: has.get(name) or said(name, *rest))


def test_doctor_reads_the_packages_own_pins(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    found = command.values("doctor")
    (torch,) = (one for one in found["libraries"] if one["name"] == "torch")
    about = {"extra": "", "name": "torch", "needs": "<3,>=2.6", "install": "torch<3,>=2.6", "state": "ok"}
    assert torch == about | {"installed": version("torch")}
    monkeypatch.setattr(requirements, "version", lambda name: "99")
    _has_core(monkeypatch, "0.16.1")
    text = command.text("doctor", status=1)
    assert "megatron-core 0.16.1 does not fit" in text
    assert f"{sys.executable} -m pip install -e '{ROOT}[nemo]' # training" in text


def test_doctor_says_when_the_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise requirements.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "metadata", absent)
    assert refused("doctor").got == "not installed"


def test_transformer_engine_is_advised_only_beside_a_gpu(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    _without(monkeypatch, "transformer-engine")
    assert command.values("doctor")["fixes"] == []
    assert "all fits" in command.text("doctor")
    monkeypatch.setattr(doctor, "_gpus", lambda: ["NVIDIA H100 80GB HBM3, 81559 MiB"])
    assert command.values("doctor")["fixes"] == [f"{sys.executable} -m pip install -e '{ROOT}[gpu]'"]


@pytest.mark.parametrize("binding", [None, "transformer_engine/wheel_lib", "."])
def test_doctor_wants_transformer_engine_with_its_torch_binding(
    monkeypatch: pytest.MonkeyPatch, command: Command, tmp_path: Path, binding: str | None
) -> None:
    (tmp_path / "transformer_engine/wheel_lib").mkdir(parents=True)
    if binding:
        (tmp_path / binding / "transformer_engine_torch.cpython-312-x86_64-linux-gnu.so").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        requirements, "version", lambda name: "2.16.1" if name == "transformer-engine" else version(name)
    )
    (engine,) = (one for one in command.values("doctor")["libraries"] if one["name"] == "transformer-engine")
    assert engine["state"] == ("ok" if binding else "missing")


def test_doctor_makes_the_environment_for_data(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "_gpus", list)
    monkeypatch.setenv("NEMO_UPCYCLE_DATA_PYTHON", "/nowhere/python")
    found = command.values("doctor")
    assert found["data_engine"] is None
    assert found["fixes"][-1] == f"make -C {ROOT} data-env"
    monkeypatch.setenv("NEMO_UPCYCLE_DATA_PYTHON", sys.executable)  # without datatrove
    assert command.values("doctor")["data_engine"] is None


def test_it_adds_an_extra_of_its_clone_or_its_libraries(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    pip = f"{sys.executable} -m pip install"
    _without(monkeypatch, "gguf", "nemo-toolkit", "transformer-engine", "transformers")
    fixes = command.values("doctor")["fixes"]
    assert f"{pip} -e '{ROOT}[demo]'" in fixes
    assert f"{pip} 'transformers>=4.56'" in fixes
    monkeypatch.setattr(doctor, "_clone", lambda: None)
    nemo, *_, demo = command.values("doctor")["fixes"]
    assert nemo == f"{pip} 'nemo-toolkit[lightning,run]<3,>=2.7'"
    assert demo == f"{pip} 'gguf<1,>=0.17'"


def _in_container(monkeypatch: pytest.MonkeyPatch, bridge: str, **own: str) -> None:
    """Let this be NVIDIA's NeMo container with a Megatron-Bridge, with releases of its own."""
    monkeypatch.setenv("NVIDIA_PYTORCH_VERSION", "25.11")
    monkeypatch.setattr(doctor, "_gpus", lambda: ["NVIDIA H100 80GB HBM3, 81559 MiB"])
    monkeypatch.setattr(doctor, "_has_torch_binding", lambda: True)
    _without(monkeypatch, "gguf", "grpcio-tools")
    installed, releases = requirements.version, {"transformer-engine": "2.12", "megatron-bridge": bridge} | own
    monkeypatch.setattr(requirements, "version", lambda name: releases.get(name) or installed(name))


def test_doctor_puts_nemos_own_releases_before_those_of_the_container_26_02(
    monkeypatch: pytest.MonkeyPatch, command: Command, tmp_path: Path
) -> None:
    """NeMo 2.7.0 beside Megatron-Core 0.16.0 and ModelOpt 0.41.0: nothing is replaced, PYTHONPATH comes first."""
    own = {"nemo-toolkit": "2.7.0", "nvidia-modelopt": "0.41.0", "filelock": "3.24.3", "scipy": "1.99"}
    _in_container(monkeypatch, "0.3.0", **own)
    _has_core(monkeypatch, "0.16.0")
    lay_over, add, export = command.values("doctor", status=1)["fixes"]
    pip = f"PIP_CONSTRAINT= {sys.executable} -m pip install --prefix in-container"
    laid_over = "'filelock<5,>=4' 'megatron-core<0.16,>=0.15.3' nvidia-modelopt==0.37.0"
    assert lay_over == f"{pip} --ignore-installed --no-deps {laid_over}"
    assert add == f"{pip} -c <({sys.executable} -m pip list --format=freeze) 'gguf<1,>=0.17'"
    shown = f'cd {tmp_path} && PYTHONPATH=/old && {export} && printf %s "$PYTHONPATH"'
    done = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True)
    site = f"in-container/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    assert done.stdout == f"{tmp_path}/{site}:/old"
    text = command.text("doctor", status=1)
    assert "container: nvcr.io/nvidia/nemo:26.02; docker/Dockerfile.nemo adds what it lacks" in text
    assert "scipy 1.99 is the container's own" in text


def test_a_container_that_has_all_it_asks_for_fits(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    """In the image of docker/Dockerfile.nemo, what NVIDIA has in releases of its own stays."""
    own = {"nemo-toolkit": "2.7.0", "scipy": "1.99"}
    for gguf, missing in (("", "gguf<1,>=0.17"), ("0.17.1", "")):
        _in_container(monkeypatch, "0.3.1", **own, gguf=gguf)
        assert command.text("doctor", "--missing") == missing
    found = command.values("doctor")
    assert (found["container"], found["fits"], found["fixes"]) == ("26.02", True, [])


@pytest.mark.parametrize(
    ("bridge", "nemo", "said"),
    [("0.2.0", "2.6.0", "nvcr.io/nvidia/nemo:25.11"), ("0.9.0", "2.9.0", "one of NVIDIA's, but none that is known")],
)
def test_doctor_names_the_container_to_take_where_nothing_can_be_laid_over(
    monkeypatch: pytest.MonkeyPatch, command: Command, bridge: str, nemo: str, said: str
) -> None:
    _in_container(monkeypatch, bridge, **{"nemo-toolkit": nemo})
    _has_core(monkeypatch, "0.15.0")
    assert not [fix for fix in command.values("doctor", status=1)["fixes"] if "--no-deps" in fix]
    text = command.text("doctor", status=1)
    assert f"container: {said}; take 26.02 for NeMo 2.7, 26.08 for Megatron-Bridge" in text


def test_it_asks_for_what_bridge_needs_in_its_container(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    _in_container(monkeypatch, "0.6.0+b558c98", **{"transformers": "5.12.1"})
    found = command.values("doctor")
    assert found["container"] == "26.08"
    states = {one["name"]: one["state"] for one in found["libraries"]}
    assert states["megatron-bridge"] == "ok"
    assert "nemo-toolkit" not in states


def test_doctor_says_how_to_activate_its_environment(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    activate = command.values("doctor")["fixes"][0]
    assert activate == f"source {Path(sys.prefix) / 'bin/activate'}"
