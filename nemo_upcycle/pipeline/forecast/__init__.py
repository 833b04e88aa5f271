"""What a run will do, shown before it is submitted: stages, memory, time, cost, disk, settings."""

from nemo_upcycle.pipeline.forecast.run import Forecast, check_space, forecast, unchecked
from nemo_upcycle.pipeline.forecast.text import render_forecast


__all__ = ["Forecast", "check_space", "forecast", "render_forecast", "unchecked"]
