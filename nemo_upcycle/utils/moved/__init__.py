"""Stubs that name the new place of each module that release 0.3 had in `nemo_upcycle.recipes`.

`nemo_upcycle.recipes` looks for a module in its own folder first, and then in this folder.
"""
