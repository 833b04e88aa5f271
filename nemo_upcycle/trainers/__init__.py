"""What trains: `base.py` says what everything else asks of a training, `nemo/` and `bridge/` fill it."""
