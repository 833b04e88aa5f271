"""Models named as on the hub: the hub's own client downloads them, here from a server that speaks its protocol."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.sources.fetch import ensure_dense
from tests.model_hub import ModelHub
from tests.unit.cli.conftest import Command, refused


SPEC = ("--experts", "2", "--top-k", "2")
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture
def hub(served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point the hub's client at the server, with an empty cache in the current folder; return that folder."""
    _, server = served
    for name, value in (("ENDPOINT", server), ("HF_HUB_CACHE", "hub"), ("HF_TOKEN_PATH", "token")):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    template = server + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.file_download.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setenv("NEMO_UPCYCLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_convert_and_verify_download_what_the_hub_names(
    hub: Path, served: tuple[Path, str], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = served
    command.text("convert", str(root / "acme/tiny"), str(root / "acme/tiny-moe"), *SPEC)
    made = command.values("convert", "hf://acme/tiny", "moe", "--branch", "acme/tiny", *SPEC)
    assert made["inexact_because"][0].startswith("experts come from 2 dense models")
    assert (hub / "moe/tokenizer.json").is_file()
    assert not list((hub / "hub").rglob("original"))
    assert "equal: yes" in command.text("verify", "acme/tiny", "hf://acme/tiny-moe", "--weights-only")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", NOWHERE)
    command.text("convert", "acme/tiny", "again", *SPEC)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("typed", "changed", "got", "fix"),
    [
        ("convert acme/huge moe", {}, "RepositoryNotFoundError", "check the name"),
        ("convert acme/gated moe", {}, "GatedRepoError", "accept the terms"),
        ("plan --gpus 8 --model hf://acme/gated", {"token": "hf_" + "b" * 34}, "GatedRepoError", "`hf auth login`"),
        ("verify acme/tiny moe", {"ENDPOINT": NOWHERE}, "LocalEntryNotFound", "`hf download acme/tiny --local-dir"),
        ("convert acme/tiny moe", {"HF_HUB_CACHE": "/dev/null/hub"}, "Not a directory", "set HF_HOME to a"),
    ],
)
def test_a_model_that_cannot_be_had_says_how_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: str, changed: dict[str, str], got: str, fix: str
) -> None:
    for name, value in changed.items():
        if name == "token":
            monkeypatch.setenv("HF_TOKEN", value)
        else:
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    error = refused(*typed.split())
    assert got in str(error.got)
    assert fix in error.fix
    assert "hf_" not in str(error)
    assert not (tmp_path / "moe").exists()


def test_plan_reads_the_configuration_of_the_hub_alone(hub: Path, command: Command) -> None:
    assert command.values("plan", "--model", "hf://acme/tiny", "--gpus", "1")["model"]["total_params"] > 0
    assert {path.name for path in (hub / "hub").rglob("snapshots/*/*")} == {"config.json"}


@pytest.mark.usefixtures("hub")
def test_the_ranks_of_a_node_ask_the_hub_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_LOCALID", "3")
    first = ensure_dense("hf://acme/tiny")  # rank 0 has not started yet, so this rank downloads
    assert (first / "model.safetensors.index.json").is_file()
    asked = len(ModelHub.asked)
    for rank, asks in (("1", False), ("0", True)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert ensure_dense("hf://acme/tiny") == first
        assert (len(ModelHub.asked) > asked) is asks
