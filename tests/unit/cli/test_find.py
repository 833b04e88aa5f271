"""`nemo-upcycle data DIR --find VALUE`: documents, samples and steps, and the words of `--skip-steps`."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.cli.main import main
from nemo_upcycle.data.chat.config import KIND
from nemo_upcycle.data.finished import MANIFEST
from nemo_upcycle.pipeline.markers import sha256
from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.trainers.base import TrainingSettings
from nemo_upcycle.utils.command_line import COMMAND
from nemo_upcycle.utils.files import MARKER, write_json
from tests.blends import set_manifest, write_blend
from tests.hostile import HOSTILE
from tests.unit.cli.conftest import Command, refused
from tests.unit.sources.test_checkpoints import write


TEXTS = [f"speech {number} on the state of the Union" for number in range(30)]
POISON = "a poisoned text, 'quoted' and $(rm -r /)"
STEPS, BATCH, SEQUENCE = 40, 2, 16


@pytest.fixture(scope="module")
def data(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [*TEXTS[:11], POISON, *TEXTS[11:], f"two: {POISON}"]
    folder = tmp_path_factory.mktemp("data") / "blend"
    return write_blend(folder, dense, texts={"train": texts, "validation": TEXTS})


def _write_run(folder: Path, data: Path, trainer: str = "nemo", **given: str) -> Path:
    """Write the files of a run whose training has begun; `given` are settings of the trainer's data."""
    plan = RunPlan("mine", "hf:///models/mine", str(data), "full", "a recipe", None, trainer)
    fixed = {f"{'data' if trainer == 'nemo' else 'dataset'}.{name}": value for name, value in given.items()}
    plan._known[sha256("a recipe")] = TrainingSettings(fixed, STEPS, {}, {})
    plan.write(folder)
    write_json(folder / "data" / MARKER, {"stage": "data", "inputs": {}, "outputs": {"folder": str(data)}})
    sizes = {"max_steps": STEPS, "global_batch_size": BATCH, "seq_length": SEQUENCE, "micro_batch_size": 1, "ranks": 1}
    rates = {"max_lr": 1e-5, "weight_decay": 0.1, "schedule": {}, "flops_per_token": {}}
    words = dict.fromkeys(("precision", "optimizer", "data"), "")
    write_json(folder / "pretrain/training.json", sizes | rates | words)
    return folder


@pytest.fixture
def run(data: Path, tmp_path: Path) -> Path:
    return _write_run(tmp_path / "run", data)


def _text_of(ranges: list[list[int]]) -> str:
    return ",".join(f"{first}:{last}" if first < last else f"{first}" for first, last in ranges)


def test_text_is_found_with_samples_and_steps(command: Command, run: Path) -> None:
    answer = command.values("data", str(run), "--find", POISON)
    assert [(one["source"], one["first"], one["last"]) for one in answer["documents"]] == [
        ("texts", 11, 11),
        ("texts", 31, 31),
    ]
    for one in answer["documents"]:
        samples = {n for first, last in one["samples"] for n in range(first, last + 1)}
        steps = {n for first, last in one["steps"] for n in range(first, last + 1)}
        assert steps == {number // BATCH + 1 for number in samples}
        assert steps <= set(range(1, STEPS + 1))
        assert len(samples) >= one["tokens"] // SEQUENCE
    assert answer["skip_steps"] == _text_of(answer["steps"]) != ""


def test_last_line_is_the_option_to_type(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(run), "--find", POISON]) == 0
    *_, steps, option = capsys.readouterr().out.splitlines()
    assert steps.startswith("Steps: ")
    assert option == f"--skip-steps {steps.removeprefix('Steps: ').replace(', ', ',')}"


def test_commands_that_rewind_each_training_are_printed(command: Command, run: Path) -> None:
    for name in ("pretrain", "dense_ct"):
        write(run / name / "checkpoints", 0, ending="")
    (run / COMMAND).write_text(f"cd /here && nemo upcycle pipeline dir={run} dense=x --only export --yes\n")
    answer = command.values("data", str(run), "--find", "texts:11")
    skip = f"--skip-steps {answer['skip_steps']}"
    assert answer["steps"][0][0] > 1
    head = f"cd /here && nemo upcycle pipeline dir={run} dense=x --rewind"
    assert answer["rewind"] == [f"{head} 1 {skip} --yes", f"{head} dense_ct:1 {skip} --yes"]


def test_document_number_is_the_document_of_the_text(command: Command, run: Path) -> None:
    by_text, by_number = (command.values("data", str(run), "--find", value) for value in (POISON, "texts:11"))
    assert by_number["documents"] == by_text["documents"][:1]


def test_source_is_one_row_with_all_its_steps(command: Command, run: Path) -> None:
    answer = command.values("data", str(run), "--find", "texts")
    (row,) = answer["documents"]
    assert (row["first"], row["last"]) == (0, 31)
    assert row["steps"] == answer["steps"] == [[1, STEPS]]


def test_skipped_start_of_the_order_moves_the_steps(command: Command, data: Path, tmp_path: Path) -> None:
    whole, later = (
        command.values("data", str(_write_run(tmp_path / name, data, **given)), "--find", "texts:11")["samples"]
        for name, given in (("whole", {}), ("later", {"skip_samples": "5", "seed": "1234"}))
    )
    assert [one for one in later if one[0] < 2 * STEPS] == [one for one in whole if one[0] >= 5]


@pytest.mark.parametrize("trainer", ["nemo", "bridge"])
def test_seed_of_the_run_is_used(command: Command, data: Path, tmp_path: Path, trainer: str) -> None:
    default, same, other = (
        command.values("data", str(_write_run(tmp_path / name, data, trainer, **given)), "--find", "texts:11")[
            "samples"
        ]
        for name, given in (("default", {}), ("same", {"seed": "1234"}), ("other", {"seed": "7"}))
    )
    assert default == same != other


def test_data_folder_has_samples_but_no_steps(command: Command, data: Path) -> None:
    answer = command.values("data", str(data), "--find", POISON)
    assert answer["documents"][0]["samples"] != []
    assert (answer["steps"], answer["skip_steps"]) == ([], "")


def test_data_folder_without_a_length_says_why(command: Command, dense: Path, tmp_path: Path) -> None:
    folder = write_blend(tmp_path / "blend", dense, texts={"train": TEXTS, "validation": TEXTS}, seq_length=None)
    text = command.text("data", str(folder), "--find", "speech 7 ")
    assert "texts:7: 35 tokens The samples are unknown, because the manifest has no seq_length." in text
    set_manifest(folder, seq_length=4096)
    assert "but more than one sequence (4096 tokens) is needed" in command.text(
        "data", str(folder), "--find", "texts:7"
    )


@pytest.mark.parametrize("value", ["no such text", "texts:32", "texts:-1", *HOSTILE.values()])
def test_missing_text_is_status_1_in_one_line(value: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", str(run), f"--find={value}"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("Not found in the 32 training documents of ")
    assert out.count("\n") == 1
    assert len(out) < 300 + len(str(run))


def test_json_of_a_missing_text_has_no_documents(command: Command, run: Path) -> None:
    answer = command.values("data", str(run), "--find", "no such text", status=1)
    assert (answer["documents"], answer["steps"], answer["skip_steps"]) == ([], [], "")


def test_changed_manifest_is_a_warning(run: Path, dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_blend(run / "own", dense, texts={"train": TEXTS, "validation": TEXTS})
    _write_run(run, data)
    write_json(data / "indices" / MARKER, {"manifest": "of an earlier weight", "files": {}})
    assert main(["data", str(run), "--find", "texts:3"]) == 0
    assert "manifest.json changed after the training began" in capsys.readouterr().err


def test_folder_that_is_neither_run_nor_data_is_refused(tmp_path: Path) -> None:
    assert f"{tmp_path} is neither the folder of a run" in str(refused("data", str(tmp_path), "--find", "x"))
    missing = str(refused("data", str(tmp_path / "nope"), "--find", "x"))
    assert missing.startswith(f"No folder of a run or of data {tmp_path / 'nope'}.")


def test_run_without_a_training_names_the_missing_stage(run: Path) -> None:
    (run / "pretrain/training.json").unlink()
    assert "training.json does not exist, and stage 'pretrain' writes it" in str(
        refused("data", str(run), "--find", "texts")
    )


def test_conversations_are_refused(tmp_path: Path) -> None:
    write_json(tmp_path / MANIFEST, {"kind": KIND})
    assert f"--find searches texts, and {tmp_path} has conversations." in str(
        refused("data", str(tmp_path), "--find", "x")
    )


@pytest.mark.parametrize(
    "words", [["--check"], ["--workers", "2"], ["--slurm", "gpu"], ["--update"], ["runs/other"], ["seq_length=8"]]
)
def test_options_of_a_build_are_refused(run: Path, words: list[str]) -> None:
    error = str(refused("data", str(run), "--find", "x", *words))
    assert error.startswith(f"--find cannot be combined with {words[0]}. Omit {words[0]}:")


def test_missing_dir_without_find_is_a_usage_error(data: Path) -> None:
    assert str(refused("data", str(data))).startswith("the following arguments are required: DIR. Type, for example,")


def test_empty_value_is_refused(run: Path) -> None:
    assert str(refused("data", str(run), "--find", "")) == "--find is empty. Give it a value."


def test_missing_megatron_is_named_with_a_fix(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_upcycle.cli.find.find_spec", lambda name: None)
    error = str(refused("data", str(run), "--find", "texts"))
    assert error.startswith("Megatron-Core is not installed")
    assert error.endswith("Run the command in the environment of NeMo or Megatron-Bridge.")
