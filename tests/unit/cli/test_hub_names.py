"""Models named as on the hub: fetched by the hub's own client, here from a server that speaks its protocol."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.cli.main import main
from nemo_upcycle.convert.offline import convert
from tests.model_hub import TOKEN, ModelHub, serving
from tests.models import write_llama, write_tokenizer
from tests.tiers import every_value


SPEC = ("--experts", "2", "--top-k", "2")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    root = tmp_path_factory.mktemp("hub")
    dense = write_tokenizer(write_llama(root / "acme/tiny", vocab_size=259, layers=1, shards=2))
    (dense / "original").mkdir()
    (dense / "original/model.safetensors").write_bytes(b"not ours")
    with open_dense(dense) as source:
        convert(source, root / "acme/tiny-moe", UpcycleSpec(num_experts=2, top_k=2))
    shutil.copytree(dense, root / "acme/gated")
    with serving(root) as endpoint:
        yield root, endpoint


def _run(
    folder: Path, endpoint: str, *words: str, token: str = "", code: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, with a hub and an empty cache of its own there, and nothing of the user's."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment = mine | {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, *(["-c", code] if code else ["-m", "nemo_upcycle.cli", *words])]
    return subprocess.run(
        command, cwd=folder, env=environment | variables, capture_output=True, text=True, check=False
    )


@pytest.mark.full
def test_convert_and_verify_download_what_the_hub_names(hub: tuple[Path, str], tmp_path: Path) -> None:
    made = _run(tmp_path, hub[1], "convert", "hf://acme/tiny", "moe", "--branch", "acme/tiny", *SPEC, "--json")
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout)
    assert found["inexact_because"][0].startswith("experts come from 2 dense models")
    assert (tmp_path / "moe/tokenizer.json").is_file()
    assert not list((tmp_path / "hf").rglob("original"))
    compared = _run(tmp_path, hub[1], "verify", "acme/tiny", "hf://acme/tiny-moe", "--weights-only")
    assert compared.returncode == 0, compared.stderr
    assert "equal: yes" in compared.stdout
    cached = _run(tmp_path, "http://127.0.0.1:9", "convert", "acme/tiny", "again", *SPEC)  # nobody answers there
    assert cached.returncode == 0, cached.stderr


@pytest.mark.slow
def test_a_name_that_the_hub_does_not_have_is_told(hub: tuple[Path, str], tmp_path: Path) -> None:
    done = _run(tmp_path, hub[1], "convert", "acme/huge", "moe", *SPEC)
    assert done.returncode == 2
    assert "error: download of acme/huge from the Hugging Face hub: got RepositoryNotFoundError" in done.stderr
    assert "or a model on the hub (hf://ORG/NAME) that this machine can reach. Fix: check the name" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "moe").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "words"),
    every_value(
        ["", "hf_" + "b" * 34],
        [("convert", "acme/gated", "moe", *SPEC), ("plan", "--model", "hf://acme/gated", "--gpus", "8")],
    ),
    ids=lambda value: value[0] if isinstance(value, tuple) else value[:3] or "no token",
)
def test_a_gated_model_says_how_to_give_a_token(
    hub: tuple[Path, str], tmp_path: Path, words: tuple[str, ...], token: str
) -> None:
    done = _run(tmp_path, hub[1], *words, token=token)
    assert done.returncode == 2
    assert "error: download of acme/gated from the Hugging Face hub: got GatedRepoError" in done.stderr
    assert "accept the terms" in done.stderr
    assert "`hf auth login`, or HF_TOKEN" in done.stderr
    assert "hf_" not in done.stdout + done.stderr


@pytest.mark.full
def test_a_gated_model_is_had_with_the_token_of_the_environment(hub: tuple[Path, str], tmp_path: Path) -> None:
    done = _run(tmp_path, hub[1], "convert", "acme/gated", "moe", *SPEC, token=TOKEN)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["hf://acme/tiny", "acme/tiny", "acme/tiny-moe"])
def test_plan_reads_the_configuration_of_the_hub_alone(hub: tuple[Path, str], tmp_path: Path, name: str) -> None:
    done = _run(tmp_path, hub[1], "plan", "--model", name, "--gpus", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"]["total_params"] > 0
    files = {path.name for path in (tmp_path / "hf/hub").rglob("snapshots/*/*")}
    assert files == {"config.json"}


@pytest.mark.slow
def test_without_a_network_it_says_what_to_do(tmp_path: Path) -> None:
    done = _run(tmp_path, "http://127.0.0.1:9", "verify", "meta-llama/Meta-Llama-3-8B", "moe")
    assert done.returncode == 2
    assert "error: download of meta-llama/Meta-Llama-3-8B from the Hugging Face hub: got" in done.stderr
    assert "`hf download meta-llama/Meta-Llama-3-8B --local-dir FOLDER`" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_hubs_cache_that_cannot_be_written_is_named(hub: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("mine")
    done = _run(tmp_path, hub[1], "convert", "acme/tiny", "moe", *SPEC)
    assert done.returncode == 2
    assert "got Not a directory, expected a folder to write, with room. Fix: set HF_HOME to one" in done.stderr


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("acme/tiny", "model 'acme/tiny': got no such folder, expected a Hugging Face folder, hf://ORG/NAME"),
        ("hf://a/b/c", "model 'a/b/c': got no such folder, expected a Hugging Face folder, hf://ORG/NAME"),
        ("asset://smollm", "model asset 'smollm' does not exist. Did you mean 'smollm2-135m'"),
        ("nemo://checkpoints/x", "got a relative path, expected a folder on this machine (nemo:///absolute/path)"),
        (
            "asset://smollm2-135m",
            "got Not a directory, expected a folder to write. Fix: set NEMO_UPCYCLE_CACHE to one",
        ),
    ],
    ids=["a mistyped folder", "too long a name", "another asset", "a relative path", "no cache"],
)
def test_what_names_nothing_is_told_before_anything_is_fetched(
    tmp_path: Path, source: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "acme").mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.setenv("NEMO_UPCYCLE_CACHE", str(tmp_path / ("file" if "135m" in source else "cache")))
    monkeypatch.chdir(tmp_path)
    assert main(["convert", source, "moe", *SPEC]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "moe").exists()


def _ensure(folder: Path, endpoint: str, **variables: str) -> Path:
    """Return what a rank that these variables tell of gets for a model of the hub."""
    code = "from nemo_upcycle.data.dense import ensure_dense; print(ensure_dense('hf://acme/tiny'))"
    done = _run(folder, endpoint, code=code, XDG_CACHE_HOME=str(folder), **variables)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.mark.full
def test_the_ranks_of_a_node_ask_the_hub_once(hub: tuple[Path, str], tmp_path: Path) -> None:
    first = _ensure(tmp_path, hub[1], LOCAL_RANK="0")
    asked = len(ModelHub.asked)
    assert _ensure(tmp_path, hub[1], LOCAL_RANK="1") == first
    assert _ensure(tmp_path, hub[1], SLURM_LOCALID="3") == first
    assert len(ModelHub.asked) == asked
    assert _ensure(tmp_path, hub[1], LOCAL_RANK="0") == first
    assert len(ModelHub.asked) > asked


@pytest.mark.full
def test_a_rank_that_comes_before_the_first_of_its_node_fetches_the_model(
    hub: tuple[Path, str], tmp_path: Path
) -> None:
    assert (_ensure(tmp_path, hub[1], SLURM_LOCALID="3") / "model.safetensors.index.json").is_file()
