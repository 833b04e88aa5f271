"""`doctor` and the start of a training agree on the releases of Megatron-Bridge, read from stand-in sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.cli import doctor
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.trainers.bridge import RELEASES, require_bridge
from nemo_upcycle.utils.progress import show_messages


def _install(folder: Path, release: str) -> None:
    sources = folder / "megatron/bridge"
    sources.mkdir(parents=True)
    (sources / "__init__.py").touch()
    (sources / "package_info.py").write_text(f'__version__ = "{release}"\n')


@pytest.mark.parametrize(
    ("release", "state"),
    [
        ("0.5.1", "does not fit"),
        ("0.6.0", "ok"),
        ("0.6.0+b558c98", "ok"),
        ("0.6.2", "ok"),
        ("0.7.1", "ok"),
        ("0.8.0rc0", "newer"),
        ("0.8.1", "newer"),
    ],
)
def test_doctor_and_gate_judge_a_release_alike(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    release: str,
    state: str,
) -> None:
    _install(tmp_path, release)
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor._described(RELEASES)["state"] == state
    monkeypatch.setattr(show_messages(), "handlers", [caplog.handler])
    if state == "does not fit":
        with pytest.raises(UpcycleError, match=f"is {release}, which is too old.*{RELEASES.bounds}"):
            require_bridge()
    else:
        require_bridge()
        require_bridge()
    said = f"Megatron-Bridge {release} is newer than this package knows"
    assert caplog.text.count(said) == (state == "newer"), "said once"
