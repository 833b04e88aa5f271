"""Write every golden file anew: `python -m tests.golden`, then read the difference."""

from tests.golden import GOLDEN, golden_path, text_of


for name in GOLDEN:
    golden_path(name).write_text(text_of(name), encoding="utf-8")
