"""Only known messages of libraries go to a file."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from nemo_upcycle.utils.sieve import sifted


def test_known_warnings_go_to_the_log_and_errors_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "logs/pretrain-libraries.log"
    with sifted(log):
        library = logging.getLogger("a library")
        library.addHandler(handler := logging.StreamHandler(sys.stderr))
        library.warning("WARNING: transformer_engine not installed. Using default recipe.")
        library.warning("-" * 80)
        library.error("out of memory")
        library.removeHandler(handler)
        sys.stderr.write("[pretrain] step 1\n")
    assert capsys.readouterr().err == "out of memory\n[pretrain] step 1\n"
    assert len(log.read_text().splitlines()) == 2
