"""What travels from the parent's folder into ours: tokenizer and licences, never code, never a file from elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.convert.export import export_checkpoint
from nemo_upcycle.convert.hf_folder import copy_tokenizer_files, tokenizer_file_names
from nemo_upcycle.convert.offline import convert
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.hf_config import ROUTER_AUX_LOSS, read_architecture
from nemo_upcycle.utils.files import MODEL_MARKER, read_json
from tests.models import write_llama, write_tokenizer
from tests.unit.convert.exports import SPEC, write_checkpoint


LICENCES = ("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md")


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A parent with everything that the hub has."""
    folder = write_tokenizer(write_llama(tmp_path / "dense", layers=2, vocab_size=259))
    for name in (*LICENCES, "tekken.json", "chat_template.jinja"):
        (folder / name).write_text(f"of {name}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tools.jinja").write_text("{{ tools }}")
    for name in ("tokenizer_mine.py", "modeling_mine.py"):
        (folder / name).write_text("raise SystemExit")
    code = {"config.json": "AutoModelForCausalLM", "tokenizer_config.json": "AutoTokenizer"}
    for name, kind in code.items():
        settings = read_json(folder / name) | {"auto_map": {kind: "them/theirs--modeling_mine.Mine"}}
        settings["custom_pipelines"] = {"mine": {"impl": "mine.Pipeline"}}
        (folder / name).write_text(json.dumps(settings))
    return folder


def test_code_of_the_parents_does_not_travel_and_licences_do(dense: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "ck", dense, SPEC)
    export_checkpoint(checkpoint, dense, tmp_path / "export", spec=SPEC)
    with open_dense(dense) as source:
        convert(source, tmp_path / "convert", UpcycleSpec(num_experts=4, top_k=2), progress=False)
    baseline = write_checkpoint(tmp_path / "baseline", dense, None)
    export_checkpoint(baseline, dense, tmp_path / "dense-again")
    for name in ("export", "convert", "dense-again"):
        folder = tmp_path / name
        texts = [path.read_text() for path in folder.rglob("*.json") if path.name != MODEL_MARKER]
        assert not any(key in text for text in texts for key in ("auto_map", "custom_pipelines", "modeling_mine"))
        assert not list(folder.rglob("*.py"))
        for companion in (*LICENCES, "tekken.json", "additional_chat_templates/tools.jinja"):
            assert (folder / companion).read_bytes() == (dense / companion).read_bytes()
            assert companion in read_json(folder / MODEL_MARKER)["companions"]
        own, before = read_json(folder / "tokenizer_config.json"), read_json(dense / "tokenizer_config.json")
        assert own == {key: value for key, value in before.items() if key not in ("auto_map", "custom_pipelines")}
        assert not (folder / "_SUCCESS.json").exists()


def test_a_link_out_of_the_parents_folder_is_refused(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    checkpoint = write_checkpoint(tmp_path / "ck", dense, SPEC)
    for name in ("tokenizer.key", "additional_chat_templates/key.jinja"):
        (dense / name).symlink_to(tmp_path / "secret")
        words = rf"{name}: got a link to .*secret, expected a file in .*put the file itself"
        with pytest.raises(UpcycleError, match=words):
            export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=SPEC)
        with open_dense(dense) as source, pytest.raises(UpcycleError, match=words):
            convert(source, tmp_path / "moe", SPEC, progress=False)
        (dense / name).unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck", "dense", "secret"]


def test_links_of_the_hubs_cache_and_within_the_folder_are_followed(dense: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--us--small"
    snapshot = home / "snapshots/0a1b"
    snapshot.mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "blobs/f00").write_text("of the hub")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/f00")
    (snapshot / "tokenizer.model").symlink_to("tokenizer.json")
    (tmp_path / "name").symlink_to(snapshot)
    (tmp_path / "to").mkdir()
    for folder in (snapshot, tmp_path / "name"):
        assert copy_tokenizer_files(folder, tmp_path / "to") == ["tokenizer.json", "tokenizer.model"]
    assert (tmp_path / "to/tokenizer.model").read_text() == "of the hub"
    assert not (tmp_path / "to/tokenizer.json").is_symlink()
    (home / "other").write_text("no blob")
    (snapshot / "vocab.json").symlink_to("../../other")
    with pytest.raises(UpcycleError, match="got a link to"):
        tokenizer_file_names(snapshot)


def test_the_coefficient_of_the_recipes_is_written_where_no_checkpoint_says_one(dense: Path, tmp_path: Path) -> None:
    moe_settings = pytest.importorskip("nemo_upcycle.recipes.common").moe_settings
    with open_dense(dense) as source:
        convert(source, tmp_path / "moe", SPEC, progress=False)
    coefficient = read_json(tmp_path / "moe/config.json")["router_aux_loss_coef"]
    assert coefficient == ROUTER_AUX_LOSS == moe_settings(SPEC)["moe_aux_loss_coeff"]


_KILLED = """
import os, signal, sys
from pathlib import Path
import nemo_upcycle.convert.export as export
from nemo_upcycle import UpcycleSpec
from nemo_upcycle.utils.streams import StreamedFile
export.MAX_SHARD_BYTES = 100_000
checkpoint, dense, output, files = sys.argv[1:]
written, write = [], StreamedFile.write
def stop(self, data):
    write(self, data)
    written.append(self)
    if len(set(written)) > int(files):
        os.kill(os.getpid(), signal.SIGKILL)
StreamedFile.write = stop
spec = UpcycleSpec(num_experts=4, top_k=2)
export.export_checkpoint(Path(checkpoint), Path(dense), Path(output), spec=spec)
"""


def _export(*words: object, check: bool = True) -> int:
    command = [sys.executable, "-c", _KILLED, *map(str, words)]
    return subprocess.run(command, check=check, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


@pytest.mark.full
def test_a_killed_export_goes_on_with_the_first_file_that_is_missing(dense: Path, tmp_path: Path) -> None:
    checkpoint, output = write_checkpoint(tmp_path / "ck", dense, SPEC), tmp_path / "hf"
    assert _export(checkpoint, dense, output, 3, check=False) == -signal.SIGKILL
    assert not output.exists()
    files = {path.name: path.stat().st_ino for path in (tmp_path / ".hf.partial").glob("*.safetensors")}
    assert len(files) == 3
    _export(checkpoint, dense, output, 99)
    assert {name: (output / name).stat().st_ino for name in files} == files
    _export(checkpoint, dense, tmp_path / "alone", 99)
    names = sorted(path.name for path in output.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "alone").iterdir())
    for name in names:
        if name not in ("README.md", "additional_chat_templates"):  # the card's title is the folder's name
            assert (output / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


@pytest.mark.slow
def test_a_killed_export_of_other_weights_is_not_gone_on_with(dense: Path, tmp_path: Path) -> None:
    checkpoint, output = write_checkpoint(tmp_path / "ck", dense, SPEC), tmp_path / "hf"
    assert _export(checkpoint, dense, output, 3, check=False) == -signal.SIGKILL
    os.utime(checkpoint / "weights/.metadata")  # another checkpoint of the same name and sizes
    before = {path.stat().st_ino: path for path in (tmp_path / ".hf.partial").glob("*.safetensors")}
    held = [path.open("rb") for path in before.values()]  # so that no inode is given out again
    _export(checkpoint, dense, output, 99)
    assert not before.keys() & {path.stat().st_ino for path in output.glob("*.safetensors")}
    for handle in held:
        handle.close()
    assert read_architecture(output).top_k == 2
