"""What a run will do, shown before it is submitted: stages, memory, time, cost, disk, settings and their origins."""

from nemo_upcycle.pipeline.forecast.run import Forecast, Origins, check_space, forecast, unchecked
from nemo_upcycle.pipeline.forecast.text import render_forecast


__all__ = ["Forecast", "Origins", "check_space", "forecast", "render_forecast", "unchecked"]
