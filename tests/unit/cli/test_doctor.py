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
    monkeypatch.setattr(doctor, "_data_engine", lambda: "nemo-upcycle 0.2.0, datatrove 0.10.1")
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


def _has_core(monkeypatch: pytest.MonkeyPatch, release: str) -> None:
    """Let the sources of Megatron-Core say that they are of a release."""
    said = doctor._value_in
    monkeypatch.setattr(
        doctor, "_value_in", lambda package, *rest: release if package == "megatron.core" else said(package, *rest)
    )


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
    monkeypatch.setattr(doctor, "version", lambda name: "99")
    _has_core(monkeypatch, "0.16.1")
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "megatron-core           0.16.1              does not fit" in text
    assert f"{sys.executable} -m pip install -e '{ROOT}[nemo]'  # training" in text


def test_doctor_names_what_verify_lacks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _without(monkeypatch, "transformers")
    found = _found(capsys)
    assert {one["state"] for one in found["libraries"] if one["name"] == "transformers"} == {"missing"}
    assert f"{sys.executable} -m pip install 'transformers>=4.56'" in found["fixes"]


def test_doctor_says_when_the_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise doctor.PackageNotFoundError(name)

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


@pytest.mark.parametrize("binding", [None, "transformer_engine/wheel_lib", "."])
def test_doctor_wants_transformer_engine_with_its_torch_binding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, binding: str | None
) -> None:
    (tmp_path / "transformer_engine/wheel_lib").mkdir(parents=True)
    if binding:
        (tmp_path / binding / "transformer_engine_torch.cpython-312-x86_64-linux-gnu.so").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "version", lambda name: "2.16.1" if name == "transformer-engine" else version(name))
    (engine,) = (one for one in _found(capsys)["libraries"] if one["name"] == "transformer-engine")
    assert engine["state"] == ("ok" if binding else "missing")


def test_doctor_makes_the_environment_for_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "_gpus", list)
    monkeypatch.setenv("NEMO_UPCYCLE_DATA_PYTHON", "/nowhere/python")
    found = _found(capsys)
    assert found["data_engine"] is None
    assert found["fixes"][-1] == f"make -C {ROOT} data-env"
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


def _in_container(monkeypatch: pytest.MonkeyPatch, bridge: str, **own: str) -> None:
    """Let this be NVIDIA's NeMo container with a Megatron-Bridge, with releases of its own."""
    monkeypatch.setenv("NVIDIA_PYTORCH_VERSION", "25.11")
    monkeypatch.setattr(doctor, "_gpus", lambda: ["NVIDIA H100 80GB HBM3, 81559 MiB"])
    monkeypatch.setattr(doctor, "_has_torch_binding", lambda: True)
    _without(monkeypatch, "gguf", "grpcio-tools")
    installed, releases = doctor.version, {"transformer-engine": "2.12", "megatron-bridge": bridge} | own
    monkeypatch.setattr(doctor, "version", lambda name: releases.get(name) or installed(name))


def test_doctor_puts_nemos_own_releases_before_those_of_the_container_26_02(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """NeMo 2.7.0 beside Megatron-Core 0.16.0 and ModelOpt 0.41.0: nothing is replaced, PYTHONPATH comes first."""
    own = {"nemo-toolkit": "2.7.0", "nvidia-modelopt": "0.41.0", "filelock": "3.24.3", "scipy": "1.99"}
    _in_container(monkeypatch, "0.3.0", **own)
    _has_core(monkeypatch, "0.16.0")
    lay_over, add, export = _found(capsys, status=1)["fixes"]
    pip = f"PIP_CONSTRAINT= {sys.executable} -m pip install --prefix in-container"
    laid_over = "'filelock<5,>=4' 'megatron-core<0.16,>=0.15.3' nvidia-modelopt==0.37.0"
    assert lay_over == f"{pip} --ignore-installed --no-deps {laid_over}"
    assert add == f"{pip} -c <({sys.executable} -m pip list --format=freeze) 'gguf<1,>=0.17'"
    shown = f'cd {tmp_path} && PYTHONPATH=/old && {export} && printf %s "$PYTHONPATH"'
    done = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True)
    site = f"in-container/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    assert done.stdout == f"{tmp_path}/{site}:/old"
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "container: nvcr.io/nvidia/nemo:26.02; docker/Dockerfile.nemo adds what it lacks" in text
    assert "scipy 1.99 is the container's own" in text
    assert "megatron-core 0.16.0 is the container's own" not in text


def test_doctor_is_content_with_a_container_that_has_what_it_asks_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the image of docker/Dockerfile.nemo, what NVIDIA has in releases of its own stays."""
    own = {"nemo-toolkit": "2.7.0", "scipy": "1.99"}
    for gguf, missing in (("", "gguf<1,>=0.17"), ("0.17.1", "")):
        _in_container(monkeypatch, "0.3.1", **own, gguf=gguf)
        assert main(["doctor", "--missing"]) == 0
        assert capsys.readouterr().out == f"{missing}\n"
    found = _found(capsys)
    assert (found["container"], found["fits"], found["fixes"]) == ("26.02", True, [])


@pytest.mark.parametrize(
    ("bridge", "own", "said"),
    [
        ("0.2.0", {"nemo-toolkit": "2.6.0"}, "nvcr.io/nvidia/nemo:25.11"),
        ("0.4.1", {"nemo-toolkit": "2.8.0"}, "nvcr.io/nvidia/nemo:26.04"),
        ("0.9.0", {"nemo-toolkit": "2.9.0"}, "one of NVIDIA's, but none that is known"),
    ],
)
def test_doctor_names_the_container_to_take_where_nothing_can_be_laid_over(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bridge: str,
    own: dict[str, str],
    said: str,
) -> None:
    _in_container(monkeypatch, bridge, **own)
    _has_core(monkeypatch, "0.15.0")
    assert not [fix for fix in _found(capsys, status=1)["fixes"] if "--no-deps" in fix]
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"container: {said}; take 26.02 for NeMo 2.7, 26.08 for Megatron-Bridge" in out


def test_doctor_asks_for_what_megatron_bridge_needs_in_its_container(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _in_container(monkeypatch, "0.6.0+b558c98", **{"transformers": "5.12.1"})
    found = _found(capsys)
    assert found["container"] == "26.08"
    states = {one["name"]: one["state"] for one in found["libraries"]}
    assert states["megatron-bridge"] == "the container's"
    assert "nemo-toolkit" not in states


def test_doctor_believes_the_sources_of_megatron_before_the_metadata(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where 0.15.3 was copied over the container's 0.16, pip still says 0.16."""
    _in_container(monkeypatch, "0.3.0", **{"nemo-toolkit": "2.7.0", "megatron-core": "0.16.1"})
    assert _value_of_core(_found(capsys)) == ("0.15.3", "ok")


def _value_of_core(found: dict[str, Any]) -> tuple[str, str]:
    (core,) = (one for one in found["libraries"] if one["name"] == "megatron-core")
    return core["installed"], core["state"]


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
