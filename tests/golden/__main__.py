"""Write all golden files again: run `python -m tests.golden`, then read the diff."""

from tests.golden import GOLDEN, PAIRS, forecasts, golden_path, messages, pairs_text, text_of


for name in GOLDEN:
    golden_path(name).write_text(text_of(name), encoding="utf-8")
PAIRS.write_text(pairs_text(), encoding="utf-8")
for recipe, cluster in forecasts.GOLDEN:
    forecasts.forecast_path(recipe, cluster).write_text(forecasts.forecast_text(recipe, cluster), encoding="utf-8")
messages.MESSAGES.write_text(messages.messages_text(), encoding="utf-8")
