"""Copy the tokenizer and licences from the parent's folder, but never code, and no file from outside the folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.cli.start.parent import inspect_parent
from nemo_upcycle.convert import export
from nemo_upcycle.convert.export import export_checkpoint
from nemo_upcycle.convert.hf_folder import copy_tokenizer_files, tokenizer_file_names
from nemo_upcycle.convert.verification import verify
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.hf_config import ROUTER_AUX_LOSS
from nemo_upcycle.sources.fetch import tokenizer_folder
from nemo_upcycle.utils.files import MODEL_MARKER, read_json, write_json
from nemo_upcycle.utils.streams import StreamedFile
from tests.folders import SPEC, converted
from tests.models import write_llama, write_tokenizer
from tests.unit.convert.exports import write_checkpoint


COMPANIONS = (
    *("LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "tekken.json", "chat_template.jinja"),
    "additional_chat_templates/tools.jinja",
)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A parent with every file that the hub may have."""
    folder = write_tokenizer(write_llama(tmp_path / "dense", layers=2, vocab_size=259, eos_token_id=[258, 257]))
    for name in COMPANIONS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"of {name}")
    (folder / "tokenizer").mkdir()
    for name in ("tokenizer_mine.py", "modeling_mine.py", "README.md"):
        (folder / name).write_text("raise SystemExit")
    code = {"config.json": "AutoModelForCausalLM", "tokenizer_config.json": "AutoTokenizer"}
    for name, kind in code.items():
        settings = read_json(folder / name) | {"auto_map": {kind: "them/theirs--modeling_mine.Mine"}}
        write_json(folder / name, settings | {"custom_pipelines": {"mine": {"impl": "mine.Pipeline"}}})
    return folder


def test_code_of_the_parents_does_not_travel_and_licences_do(dense: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "ck", dense, SPEC)
    export_checkpoint(checkpoint, dense, tmp_path / "export", spec=SPEC)
    converted(dense, tmp_path / "convert")
    baseline = write_checkpoint(tmp_path / "baseline", dense, None)
    export_checkpoint(baseline, dense, tmp_path / "dense-again")
    own = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    own |= {path.name for path in dense.glob("special_tokens_map.json")}  # transformers 5 omits this file
    for name in ("export", "convert", "dense-again"):
        folder = tmp_path / name
        companions = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        companions -= {"config.json", "model.safetensors", "README.md", MODEL_MARKER}
        assert companions == {*COMPANIONS, *own} == {*read_json(folder / MODEL_MARKER)["companions"]}
        for companion in companions - {"tokenizer_config.json"}:
            assert (folder / companion).read_bytes() == (dense / companion).read_bytes()
        assert not read_json(folder / "config.json").keys() & {"auto_map", "custom_pipelines"}
        lost = read_json(dense / "tokenizer_config.json").keys() - read_json(folder / "tokenizer_config.json").keys()
        assert lost == {"auto_map", "custom_pipelines"}
        assert read_json(folder / "config.json")["eos_token_id"] == [258, 257]


def test_a_link_out_of_the_parents_folder_is_refused(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    checkpoint = write_checkpoint(tmp_path / "ck", dense, SPEC)
    for name in ("tokenizer.model", "additional_chat_templates/key.jinja"):
        (dense / name).symlink_to(tmp_path / "secret")
        words = rf"{name} is a link to .*secret, outside .*Put the file itself"
        with pytest.raises(UpcycleError, match=words):
            export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=SPEC)
        with pytest.raises(UpcycleError, match=words):
            converted(dense, tmp_path / "moe")
        (dense / name).unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ck", "dense", "secret"]


def test_files_that_no_class_needs_stay_behind(dense: Path, tmp_path: Path) -> None:
    kept = ("tokenizer.model", "tokenizer.model.v3", "vocab.txt", "chat_template.json", "LICENCE.txt", "qwen.tiktoken")
    left = ("tokenizer.pkl", "tokenizer.bin", "tokenizer_secrets.json", "LICENSE.pkl", "NOTICE.py", ".env", "vocab.pt")
    for name in (*kept, *left):
        (dense / name).write_text("of the parent")
    found = tokenizer_file_names(dense)
    assert set(kept) <= set(found)
    assert not set(left) & set(found)


def test_a_damaged_tokenizer_is_refused_before_any_work(dense: Path, tmp_path: Path) -> None:
    checkpoint, moe = write_checkpoint(tmp_path / "ck", dense, SPEC), converted(dense, tmp_path / "moe").output
    calls: dict[str, Callable[[], object]] = {
        "convert": lambda: converted(dense, tmp_path / "out"),
        "export": lambda: export_checkpoint(checkpoint, dense, tmp_path / "out", spec=SPEC),
        "start": lambda: inspect_parent(str(dense)),
        "data": lambda: tokenizer_folder(str(dense)),
        "verify": lambda: verify(dense, moe),
    }
    for folder, name in ((dense, "tokenizer.json"), (dense, "tokenizer_config.json"), (moe, "tokenizer.json")):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[:300])
        for call in [calls["verify"]] if folder == moe else calls.values():
            with pytest.raises(UpcycleError, match=rf"{folder / name} is (damaged \(|not valid JSON)"):
                call()
        (folder / name).write_bytes(whole)
    assert not (tmp_path / "out").exists()


def test_follows_links_within_the_folder_and_the_hubs_cache(dense: Path, tmp_path: Path) -> None:
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
    with pytest.raises(UpcycleError, match=r"vocab\.json is a link to"):
        tokenizer_file_names(snapshot)


def test_writes_the_recipes_coefficient_if_a_checkpoint_has_none(dense: Path, tmp_path: Path) -> None:
    moe_settings = pytest.importorskip("nemo_upcycle.trainers.nemo.upcycled").moe_settings
    converted(dense, tmp_path / "moe")
    coefficient = read_json(tmp_path / "moe/config.json")["router_aux_loss_coef"]
    assert coefficient == ROUTER_AUX_LOSS == moe_settings(SPEC)["moe_aux_loss_coeff"]


@pytest.mark.parametrize("same", [True, False], ids=["the same", "other weights"])
def test_a_stopped_export_goes_on_with_the_same(dense: Path, tmp_path: Path, monkeypatch: Any, same: bool) -> None:
    checkpoint, output = write_checkpoint(tmp_path / "ck", dense, SPEC), tmp_path / "hf"
    monkeypatch.setattr(export, "MAX_SHARD_BYTES", 100_000)
    written, write = [], StreamedFile.write

    def stop(self: StreamedFile, data: memoryview) -> None:
        write(self, data)
        written.append(self)
        if len(set(written)) > 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(StreamedFile, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(checkpoint, dense, output, spec=SPEC)
    monkeypatch.setattr(StreamedFile, "write", write)
    assert not output.exists()
    aside = tmp_path / ".hf.partial"
    kept = {path.name: path.stat().st_ino for path in aside.glob("*.safetensors")}
    assert len(kept) == 3
    # Keep the files open, so that their inode numbers are not reused.
    held = [path.open("rb") for path in aside.glob("*.safetensors")]
    (aside / "model-00009-of-00009.safetensors.unfinished").write_bytes(b"half")  # a file that a killed process left
    if not same:
        os.utime(checkpoint / "weights/.metadata")  # looks like another checkpoint with the same name and sizes
    export_checkpoint(checkpoint, dense, output, spec=SPEC)
    found = {name: (output / name).stat().st_ino for name in kept}
    assert found == kept if same else not set(found.values()) & set(kept.values())
    export_checkpoint(checkpoint, dense, tmp_path / "alone", spec=SPEC)
    for path in (tmp_path / "alone").iterdir():
        if path.is_file() and path.name != "README.md":  # the card's title is the folder's name
            assert (output / path.name).read_bytes() == path.read_bytes()
    assert len([*output.iterdir()]) == len([*(tmp_path / "alone").iterdir()])
    for handle in held:
        handle.close()
