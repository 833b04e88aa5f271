"""`nemo-upcycle doctor`: its findings, and the command that installs the missing packages."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from nemo_upcycle.cli import doctor
from nemo_upcycle.utils import requirements
from tests.unit.cli.conftest import Command, refused


ROOT = Path(__file__).parents[3]
PIP = f"{sys.executable} -m pip install"


@pytest.fixture(autouse=True)
def _plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine that has no GPUs, is not a container, and has the data environment."""
    monkeypatch.setattr(doctor, "_gpus", list)
    monkeypatch.setattr(doctor, "_data_engine", lambda: "nemo-upcycle 0.2.0, datatrove 0.10.1")
    monkeypatch.delenv("NVIDIA_PYTORCH_VERSION", raising=False)


def _without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def installed(name: str) -> str:
        if name in names:
            raise requirements.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(requirements, "version", installed)


def _has_core(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    """Pretend that the sources of Megatron-Core name this release."""
    said = requirements.value_in
    has = {"megatron.core": release}
    monkeypatch.setattr(requirements, "value_in", lambda name, *rest: has.get(name) or said(name, *rest))


def test_reads_the_packages_own_pins(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    found = command.values("doctor")
    (torch,) = (one for one in found["libraries"] if one["name"] == "torch")
    about = {"extra": "", "name": "torch", "needs": "<3,>=2.6", "install": "torch<3,>=2.6", "state": "ok"}
    assert torch == about | {"installed": version("torch")}
    monkeypatch.setattr(requirements, "version", lambda name: "99")
    _has_core(monkeypatch, "0.16.1")
    text = command.text("doctor", status=1)
    assert "megatron-core 0.16.1 does not fit" in text
    assert f"{PIP} 'torch<3,>=2.6'" in text


def test_says_when_the_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise requirements.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "metadata", absent)
    assert str(refused("doctor")).startswith("nemo-upcycle is not installed.")


def test_transformer_engine_is_advised_only_beside_a_gpu(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    _without(monkeypatch, "transformer-engine")
    assert command.values("doctor")["fixes"] == []
    assert "all fits" in command.text("doctor")
    monkeypatch.setattr(doctor, "_gpus", lambda: ["NVIDIA H100 80GB HBM3, 81559 MiB"])
    assert command.values("doctor")["fixes"] == [f"{PIP} 'transformer-engine[pytorch]<3,>=2.8'"]


@pytest.mark.parametrize("binding", [None, "transformer_engine/wheel_lib", "."])
def test_wants_transformer_engine_with_its_torch_binding(
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


def test_makes_the_environment_for_data(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "_gpus", list)
    monkeypatch.setenv("NEMO_UPCYCLE_DATA_PYTHON", "/nowhere/python")
    found = command.values("doctor")
    assert found["data_engine"] is None
    assert f"/.venv-data/bin/pip install --no-deps -e {ROOT}" in found["fixes"][-1]
    monkeypatch.setenv("NEMO_UPCYCLE_DATA_PYTHON", sys.executable)  # this environment lacks datatrove
    assert command.values("doctor")["data_engine"] is None


def test_one_command_adds_all_that_is_missing(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    _without(monkeypatch, "gguf", "nemo-toolkit", "transformer-engine")
    missing = ["nemo-toolkit[lightning,run]<3,>=2.7", "gguf<1,>=0.17"]
    assert command.values("doctor")["fixes"] == [f"{PIP} {' '.join(map(repr, missing))}"]
    assert command.text("doctor", "--missing") == " ".join(missing)


def _in_container(monkeypatch: pytest.MonkeyPatch, **own: str) -> None:
    """Simulate NVIDIA's NeMo container, with the given releases of some packages."""
    monkeypatch.setenv("NVIDIA_PYTORCH_VERSION", "25.11")
    monkeypatch.setattr(doctor, "_has_torch_binding", lambda: True)
    _without(monkeypatch, "grpcio-tools")
    installed, releases = requirements.version, {"transformer-engine": "2.12"} | own
    monkeypatch.setattr(requirements, "version", lambda name: releases.get(name) or installed(name))


def test_a_container_keeps_its_own_releases(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    _in_container(monkeypatch, scipy="1.99")
    found = command.values("doctor")
    assert (found["fits"], found["fixes"]) == (True, [])
    assert {one["state"] for one in found["libraries"] if one["name"] == "scipy"} == {"ok", "the container's"}


@pytest.mark.parametrize("own", [{"nemo-toolkit": "2.6.0"}, {"nvidia-modelopt": "0.41.0"}])
def test_a_container_with_other_releases_needs_an_image(
    monkeypatch: pytest.MonkeyPatch, command: Command, own: dict[str, str]
) -> None:
    _in_container(monkeypatch, **own)
    (image,) = command.values("doctor", status=1)["fixes"]
    assert image == "docker build -f docker/Dockerfile.nemo -t nemo-upcycle:nemo ."
