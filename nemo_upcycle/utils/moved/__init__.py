"""Name the new place of each module that 0.3 had in `nemo_upcycle.recipes`, which looks here after its own folder."""
