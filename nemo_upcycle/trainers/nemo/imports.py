"""Import NeMo quietly: importing it warns of every optional part that is not there."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from nemo_upcycle.utils.console import LIBRARIES, is_verbose, quiet_libraries


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Import NeMo without warnings of optional parts (zarr, OneLogger, `deploy`); show errors."""
    if is_verbose():
        yield
        return
    from nemo.utils import logging as nemo_logging

    levels = {name: logging.getLogger(name).level for name in (*LIBRARIES, "nemo")}
    verbosity = nemo_logging.get_verbosity()
    with warnings.catch_warnings():
        quiet_libraries()
        logging.getLogger("nemo").setLevel(logging.ERROR)
        nemo_logging.set_verbosity(logging.ERROR)
        try:
            yield
        finally:
            nemo_logging.set_verbosity(verbosity)
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
