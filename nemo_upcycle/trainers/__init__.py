"""The trainers: `base.py` is the contract of a training, which `nemo/` and `bridge/` implement."""
