"""The recipe on a finished data folder: a run that was resumed, and lengthened, reads what one run reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.blends import write_blend
from tests.functional.runs import Runs
from tests.functional.tiny import BATCH


pytestmark = [pytest.mark.slow, pytest.mark.full]
RANKS = 2
#: Together about as many tokens as ten sequences.
SOURCES = {"talks": (0.7, {"train": [10], "validation": [12]}), "books": (0.3, {"train": [6], "validation": [8]})}


def test_resumed_and_lengthened_run_reads_the_same_samples(tmp_path: Path) -> None:
    """The first half ends within the first epoch; Megatron alone would lay out both epochs anew."""
    runs = Runs(tmp_path)
    blend = write_blend(tmp_path / "blend", runs.parent, SOURCES)

    def read(name: str, steps: int) -> list[str]:
        """Train to a step; return the samples of the run so far, those of one rank after those of the other."""
        record = tmp_path / f"{name}.samples"
        options = {"every": 2, "validate_every": 2, "blend": str(blend), "record": {"path": str(record)}}
        lines = runs.train(name, RANKS, ep=RANKS, steps=steps, **options)
        assert lines[-1]["step"] == steps
        return [line for rank in range(RANKS) for line in Path(f"{record}.{rank}").read_text().splitlines()]

    whole = read("whole", 4)
    assert len(whole) == 4 * BATCH
    assert len(read("halves", 2)) == 2 * BATCH
    assert read("halves", 4) == whole
    settings = json.loads((tmp_path / "halves/training.json").read_text())
    assert settings["data"] == "blend tiny (blend)"
