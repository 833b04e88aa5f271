"""The trainers of this package, by their names for `nemo-upcycle plan --backend`."""

from __future__ import annotations

from importlib.util import find_spec

from nemo_upcycle.trainers.commands import Commands


BACKENDS: dict[str, Commands] = {}
if find_spec("nemo_upcycle.trainers.nemo"):
    from nemo_upcycle.trainers.nemo.commands import NeMoCommands

    BACKENDS["nemo"] = NeMoCommands()
if find_spec("nemo_upcycle.trainers.bridge"):
    from nemo_upcycle.trainers.bridge.commands import BridgeCommands

    BACKENDS["bridge"] = BridgeCommands()
