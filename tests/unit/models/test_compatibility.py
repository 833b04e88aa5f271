"""The table of which class runs where: its files, its words, and the command that fills it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import compatibility as command
from benchmarks.doc_tables import TABLES
from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models import compatibility as module
from nemo_upcycle.models.compatibility import ANY, FOLDER, PROPERTIES, QWEN3_VL, Row, Written, caveats, runtimes
from nemo_upcycle.models.families import targets
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.hf_model import require_known
from nemo_upcycle.utils.conf import packaged
from tests.folders import converted
from tests.models import write_llama, write_smollm3


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the table, which the package then reads."""
    shutil.copytree(packaged(FOLDER), tmp_path / FOLDER)
    monkeypatch.setattr(module, "packaged", lambda kind: tmp_path / kind)
    runtimes.cache_clear()
    yield tmp_path / FOLDER
    monkeypatch.undo()
    runtimes.cache_clear()


def _places(parent: Path, output: Path) -> list[str]:
    """Convert a SmolLM3, and return the four texts that come from the table."""
    done = converted(parent, output)
    with pytest.raises(CheckpointError) as refused:
        require_known(output)
    card = (output / "README.md").read_text(encoding="utf-8")
    return [" ".join(done.caveats), card, TABLES["runtimes"](), str(refused.value)]


def test_one_changed_cell_changes_all_four_places(table: Path, tmp_path: Path) -> None:
    parent = write_smollm3(tmp_path / "dense")
    before = _places(parent, tmp_path / "before")
    assert "4.57.6 does not know GraniteMoeSWAForCausalLM, but 5.24.0 does" in before[3]
    runtime = module.read_runtime("transformers5")
    rows = [replace(row, result="other") if "SWA" in row.hf_class else row for row in runtime.rows]
    command.write(table / "transformers5.yaml", runtime, rows)
    runtimes.cache_clear()
    after = _places(parent, tmp_path / "after")
    for old, new in zip(before[:2], after[:2], strict=True):
        assert "transformers 5: its tokens differ from the parent" not in old
        assert "transformers 5: its tokens differ from the parent" in new
    assert after[2].count("**other tokens**") == before[2].count("**other tokens**") + 1
    assert "but 5.24.0 does" not in after[3]


def test_rows_name_known_classes_and_properties() -> None:
    classes = {ANY, QWEN3_VL, *(family.hf_class for family in targets())}
    for runtime in runtimes():
        keys = [(row.hf_class, row.where) for row in runtime.rows]
        assert len(keys) == len(set(keys)), runtime.name
        assert {name for name, _ in keys} <= classes, runtime.name
        assert {where for _, where in keys} <= {"", *PROPERTIES}, runtime.name
        assert all(row.result in module.WORDS for row in runtime.rows), runtime.name


def test_a_class_without_a_row_was_not_tried(dense: Path) -> None:
    arch = replace(read_architecture(dense).upcycled(UpcycleSpec()), hf_class="NewMoeForCausalLM")
    names = ", ".join(runtime.name for runtime in runtimes())
    assert caveats(Written(arch, 2)) == (f"{names}: not tried",)


def test_a_class_that_runs_everywhere_needs_no_words(tmp_path: Path) -> None:
    arch = read_architecture(write_llama(tmp_path)).upcycled(UpcycleSpec())
    assert caveats(Written(arch, 2)) == ()
    assert caveats(Written(read_architecture(tmp_path), 2)) == ()


def test_the_command_dates_the_rows_whose_models_ran() -> None:
    rows = [
        Row("A", "same"),
        Row("A", "same", "dense layers"),
        Row("B", "not run"),
        Row("C", "option", "dense layers"),
    ]
    dense = {"where": ["dense layers"]}
    records = [
        {"hf_class": "A", "where": [], "result": "same"},
        {"hf_class": "A", "result": "other"} | dense,
        {"hf_class": "C", "result": "same"} | dense,
        {"hf_class": "D", "where": ["softmax before top-k"], "result": "refused"},
    ]
    assert command.updated(rows, records, "2026-01-02") == [
        Row("A", "same", date="2026-01-02"),
        Row("A", "other", "dense layers", date="2026-01-02"),
        Row("B", "not run"),
        Row("C", "option", "dense layers", date="2026-01-02"),
        Row("D", "refused", date="2026-01-02"),
    ]


def test_a_second_property_does_not_explain_the_first() -> None:
    rows = [Row("A", "same", "dense layers"), Row("A", "same", "softmax before top-k")]
    records = [
        {"hf_class": "A", "where": ["dense layers"], "result": "other"},
        {"hf_class": "A", "where": ["dense layers", "softmax before top-k"], "result": "refused"},
    ]
    assert [row.result for row in command.updated(rows, records, "2026-01-02")] == ["other", "refused"]
