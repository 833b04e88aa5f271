"""`start` chooses a run for the hardware: a trial on a CPU, the planner's layout on GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.cli.start import choices as module
from nemo_upcycle.cli.start.choices import TRAINERS, Choices, Wanted, choose, choose_trainer, shortages, writable_part
from nemo_upcycle.cli.start.parent import FoundParent
from nemo_upcycle.cli.start.texts import Texts
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.planning.hardware import known_shape
from nemo_upcycle.trainers import paper


MANY = Texts({}, 2_000_000, 2 * 10**9, {})


def _chosen(shape: str = "llama3_8b", texts: Texts = MANY, **wanted: object) -> Choices:
    given = {"spec": {}, "gpus": 0} | wanted
    return choose(FoundParent("/models/mine", known_shape(shape), None), texts, "nemo", Wanted(**given))  # type: ignore[arg-type]


def test_without_gpus_it_is_a_trial_of_ten_short_steps() -> None:
    made = _chosen("smollm2_135m")
    assert (made.gpus, made.seq_length, made.steps, made.global_batch, made.suite) == (0, 128, 10, 2, "trial")
    assert made.peak <= paper.HIGH


@pytest.mark.parametrize(("gpus", "texts"), [(16, MANY), (64, MANY), (64, replace(MANY, tokens=10**11))])
def test_on_gpus_the_texts_are_read_once(gpus: int, texts: Texts) -> None:
    made = _chosen(gpus=gpus, gpu="h100", texts=texts)
    assert made.plan
    assert made.plan.verdict == "fits"
    assert made.plan.layout.vp == made.plan.layout.etp == 1
    assert made.global_batch % made.plan.layout.dp == 0
    assert made.steps * made.global_batch * made.seq_length <= texts.tokens
    assert made.steps >= 100
    assert (made.peak, made.end) == (paper.PEAK, paper.END)


@pytest.mark.parametrize(
    ("wanted", "said"), [({"gpus": 1, "gpu": "h100"}, "Give --gpus 16"), ({"gpus": 8, "gpu": "h1000"}, "h1000")]
)
def test_what_does_not_fit_is_refused_with_what_does(wanted: dict[str, object], said: str) -> None:
    with pytest.raises(UpcycleError, match=said):
        _chosen(**wanted)


@pytest.mark.parametrize("wanted", [{"steps": 1_000_000}, {"gpus": 4096, "gpu": "h100"}])
def test_texts_are_read_a_thousand_times_only_if_asked(wanted: dict[str, Any]) -> None:
    few = replace(MANY, tokens=100_000, documents=100)
    with pytest.raises(UpcycleError) as refused:
        _chosen("smollm2_135m", few if "steps" in wanted else replace(few, tokens=10_000), **wanted)
    assert "To read them more than 100 times, give --epochs" in str(refused.value)


def test_epochs_choose_the_steps_and_many_are_said() -> None:
    texts = replace(MANY, tokens=100_000, documents=100)
    made = _chosen("smollm2_135m", texts, epochs=200)
    assert made.steps * made.global_batch * made.seq_length == pytest.approx(200 * texts.tokens, rel=1e-3)
    (row,) = [row for row in made.rows if row[0] == "epochs"]
    assert row[1].startswith("200: ")
    assert row[2].startswith("MORE THAN 4 TIMES")
    assert "from the sample" in _chosen("smollm2_135m", texts).rows[-1]


def test_a_machine_that_is_too_small_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory_bytes", lambda: 10**9)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    disk, memory = map(str, shortages(_chosen("smollm2_135m"), tmp_path / "runs/new"))
    assert disk.startswith(f"The disk of {tmp_path} has 953.7 MiB free")
    assert memory.startswith("This machine has 0.9 GiB of memory free")


def test_a_folder_that_takes_no_file_is_named() -> None:
    for folder, why in ((Path("/dev/null"), "it is a file"), (Path("/proc/mine"), "no such file")):
        with pytest.raises(UpcycleError, match=f"Cannot write in /.*: {why}"):
            writable_part(folder)


@pytest.mark.parametrize("installed", [["nemo"], ["megatron.bridge"], ["nemo", "megatron.bridge"]])
def test_takes_the_trainer_that_is_installed(monkeypatch: pytest.MonkeyPatch, installed: list[str]) -> None:
    monkeypatch.setattr(module, "_has", installed.__contains__)
    assert TRAINERS[choose_trainer()][0] == installed[0]


def test_names_doctor_if_no_trainer_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has", lambda _: False)
    with pytest.raises(UpcycleError, match="nemo-upcycle doctor"):
        choose_trainer()


def test_the_drivers_gpus_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}/information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n")
    monkeypatch.setattr(module, "_PROC", tmp_path)
    assert module.gpus_here() == (2, "h100")
