"""The files say what was chosen, for both trainers from one object, and none that was edited is overwritten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_upcycle.data.blend import read_blend
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.planning.hardware import known_shape
from nemo_upcycle.start.choices import Choices, Wanted, choose
from nemo_upcycle.start.files import blend_text, recipe_text, run_command, write_files
from nemo_upcycle.start.parent import FoundParent
from nemo_upcycle.start.texts import Texts


PARENT = FoundParent("/models/mine", known_shape("llama3_8b"), None)
TEXTS = Texts({"train": ["/texts/**/*.txt"], "options": {"text_key": "body"}}, 2_000_000, 2 * 10**9, "")


def _chosen(trainer: str, gpus: int) -> Choices:
    return choose(PARENT, TEXTS, (trainer, ""), Wanted({}, gpus=gpus, gpu="h100" if gpus else None))


@pytest.mark.parametrize("trainer", ["nemo", "bridge"])
@pytest.mark.parametrize("gpus", [0, 64])
def test_a_recipe_is_python_and_says_what_was_chosen(trainer: str, gpus: int) -> None:
    made = _chosen(trainer, gpus)
    text = recipe_text(PARENT, made)
    compile(text, "recipe.py", "exec")
    assert max(map(len, text.splitlines())) < 140
    assert "UpcycleSpec(num_experts=8, top_k=2)" in text
    assert f"seq_length={made.seq_length}" in text
    if made.plan and made.plan.layout.tp > 1:
        name = "tensor_parallelism" if trainer == "nemo" else "tensor_model_parallel_size"
        assert f"{name}={made.plan.layout.tp}" in text


def test_a_blend_reads_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "blend.yaml").write_text(blend_text(TEXTS, _chosen("nemo", 0)))
    config = read_blend(tmp_path / "blend.yaml").config
    assert config.sources["texts"].options == {"text_key": "body"}
    assert (config.seq_length, config.hold_out.heldout) == (128, 0.001)


def test_files_are_written_once_and_never_over_others(tmp_path: Path) -> None:
    files = {"recipe.py": "one\n", "blend.yaml": "two\n"}
    assert write_files(tmp_path / "new", files, str)
    assert not write_files(tmp_path / "new", files, str)
    (tmp_path / "new/recipe.py").write_text("edited\n")
    with pytest.raises(UpcycleError, match=r"recipe\.py with other content.*go on with what is there: COMMAND"):
        write_files(tmp_path / "new", files, lambda: "COMMAND")
    assert (tmp_path / "new/recipe.py").read_text() == "edited\n"


def test_the_command_finds_the_recipe_wherever_its_folder_is(tmp_path: Path) -> None:
    made = _chosen("nemo", 0)
    assert run_command(Path("runs/my run"), PARENT, made).startswith("PYTHONPATH='runs/my run' ")
    bridge = run_command(tmp_path, PARENT, replace(made, trainer="bridge"))
    assert "recipe=recipe:pretrain dense_ct=recipe:dense_ct gpus=2" in bridge
