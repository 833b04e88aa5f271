"""`calibrate` writes a calibration file, and `convert` uses the file."""

from __future__ import annotations

from pathlib import Path

from tests.unit.cli.conftest import Command, refused


SPEC = ("--experts", "4", "--top-k", "4", "--granularity", "2", "--router-init", "prompts")


def test_what_is_calibrated_is_converted(dense: Path, tmp_path: Path, command: Command) -> None:
    file, texts = str(tmp_path / "file"), tmp_path / "texts.yaml"
    texts.write_text("- [how to bake, flour and eggs]\n- the court rules\n")
    typed = ("calibrate", str(dense), file, *SPEC, "--router-prompts", str(texts))
    done = command.values(*typed)
    assert (done["made"], done["layers"]) == (True, 2)
    assert "made before, from the same inputs" in command.text(*typed)
    convert = ("convert", str(dense), str(tmp_path / "moe"), *SPEC)
    assert "Computes the parent's function" in command.text(*convert, "--calibration", file)
    for option, said in (("--router-prompts", "--calibration is missing"), ("--calibration", "No calibration file x")):
        assert str(refused(*convert, option, "x")).startswith(said)
