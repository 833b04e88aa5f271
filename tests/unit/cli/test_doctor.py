"""`nemo-upcycle doctor`: what it finds, and that each of its fixes is a command that works on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.cli import doctor
from nemo_upcycle.cli.main import main
from nemo_upcycle.errors import UpcycleError


ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without GPUs, outside of containers, its environment activated, the one for data beside it."""
    monkeypatch.setattr(doctor, "_gpus", list)
    monkeypatch.setattr(doctor, "_data_engine", lambda: "nemo-upcycle 0.1.0, datatrove 0.10.1")
    monkeypatch.delenv("NVIDIA_PYTORCH_VERSION", raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}")


def _found(capsys: pytest.CaptureFixture[str], status: int = 0) -> dict[str, Any]:
    assert main(["doctor", "--json"]) == status
    return json.loads(capsys.readouterr().out)


def _without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def installed(name: str) -> str:
        if name in names:
            raise doctor.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(doctor, "version", installed)


def test_doctor_reads_the_packages_own_pins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    by_name = {one["name"]: one for one in found["libraries"] if one["extra"] in ("", "nemo")}
    assert by_name["torch"] == {
        "extra": "", "name": "torch", "needs": "<3,>=2.6", "install": "torch<3,>=2.6",
        "installed": version("torch"), "state": "ok",
    }  # fmt: skip
    assert by_name["megatron-core"]["extra"] == "nemo"
    monkeypatch.setattr(doctor, "version", lambda name: "0.16.1" if name == "megatron-core" else "99")
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "megatron-core           0.16.1              does not fit" in text
    assert f"{sys.executable} -m pip install -e '{ROOT}[nemo]'  # training" in text


def test_doctor_says_when_the_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "metadata", absent)
    with pytest.raises(UpcycleError, match="nemo-upcycle: got not installed"):
        doctor._libraries()


def test_doctor_advises_transformer_engine_only_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _without(monkeypatch, "transformer-engine")
    assert _found(capsys)["fixes"] == []
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "all fits" in text
    assert "gpu: FP8 and grouped GEMM on NVIDIA GPUs; NVIDIA's NeMo container has it" in text
    monkeypatch.setattr(doctor, "_gpus", lambda: ["NVIDIA H100 80GB HBM3, 81559 MiB"])
    assert _found(capsys)["fixes"] == [f"{sys.executable} -m pip install -e '{ROOT}[gpu]'"]


def test_doctor_makes_the_environment_for_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "_gpus", list)
    monkeypatch.setenv("NEMO_UPCYCLE_DATA_PYTHON", "/nowhere/python")
    found = _found(capsys)
    assert found["data_engine"] is None
    assert f"make -C {ROOT} data-env" in found["fixes"]
    monkeypatch.setenv("NEMO_UPCYCLE_DATA_PYTHON", sys.executable)  # without datatrove
    assert _found(capsys)["data_engine"] is None


def test_doctor_names_the_libraries_where_there_is_no_clone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _without(monkeypatch, "gguf", "nemo-toolkit", "transformer-engine")
    assert f"{sys.executable} -m pip install -e '{ROOT}[demo]'" in _found(capsys)["fixes"]
    monkeypatch.setattr(doctor, "_clone", lambda: None)
    fixes = _found(capsys)["fixes"]
    assert fixes == [
        f"{sys.executable} -m pip install 'nemo-toolkit[lightning,run]<3,>=2.7'",
        f"{sys.executable} -m pip install 'gguf<1,>=0.17'",
    ]


def test_doctor_replaces_nothing_of_a_container(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its torch, Megatron and Transformer Engine belong together: what is missing is added, the rest left alone."""
    monkeypatch.setenv("NVIDIA_PYTORCH_VERSION", "25.11")
    monkeypatch.setattr(doctor, "_gpus", lambda: ["NVIDIA H100 80GB HBM3, 81559 MiB"])
    _without(monkeypatch, "gguf")
    installed, own = doctor.version, {"megatron-core": "0.16.1", "transformer-engine": "2.9"}
    monkeypatch.setattr(doctor, "version", lambda name: own.get(name) or installed(name))
    found = _found(capsys, status=1)
    assert found["fixes"] == [f"{sys.executable} -m pip install 'gguf<1,>=0.17'"]
    assert main(["doctor"]) == 1
    assert "megatron-core is the container's own: choose a container that fits" in capsys.readouterr().out


def test_doctor_says_how_to_activate_its_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    activate = _found(capsys)["fixes"][0]
    assert activate == f"source {Path(sys.prefix) / 'bin/activate'}"
    done = subprocess.run(
        ["bash", "-c", f"{activate} && command -v nemo-upcycle"], capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).parent == Path(sys.prefix) / "bin"
