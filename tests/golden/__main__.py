"""Write every golden file and the planner's file anew: `python -m tests.golden`, then read the difference."""

from tests.golden import GOLDEN, PLANNER, golden_path, planner_text, text_of


for name in GOLDEN:
    golden_path(name).write_text(text_of(name), encoding="utf-8")
PLANNER.write_text(planner_text(), encoding="utf-8")
