"""What a run will do, said before it is submitted: stages, memory, time, cost, disk, settings and their origins."""

from nemo_upcycle.pipeline.forecast.run import Forecast, check_space, check_stages, forecast
from nemo_upcycle.pipeline.forecast.text import render_forecast


__all__ = ["Forecast", "check_space", "check_stages", "forecast", "render_forecast"]
