"""`doctor` reads the version bounds in this package's metadata as pip does."""

from __future__ import annotations

from importlib.metadata import metadata

import pytest
from packaging.requirements import Requirement

from nemo_upcycle.utils.requirements import requirement


LINES = metadata("nemo-upcycle").get_all("Requires-Dist") or []
#: Versions of NVIDIA's builds, release candidates and ordinary releases.
VERSIONS = [
    *("0.15.2", "0.15.3", "0.15.3+cu13", "0.16.0rc0", "0.16.0.dev1", "0.16", "0.16.1", "0.37.0", "2026.1.15"),
    *("1.26.4", "2", "2.6", "2.6.0rc1", "2.7.0", "2.10.0a0+5228986c39.nv25.6", "2.99.9", "3", "3.0.0rc1", "4.56.0"),
]


def test_every_line_is_taken_apart_as_pip_does() -> None:
    assert len(LINES) > 40
    for line in LINES:
        ours, theirs = requirement(line), Requirement(line)
        assert (ours.name, ours.bounds) == (theirs.name, str(theirs.specifier))
        assert set(filter(None, ours.extras.split(","))) == theirs.extras
        assert (f'extra == "{ours.extra}"' if ours.extra else "None") == str(theirs.marker)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_fits_as_it_does_for_pip(version: str) -> None:
    for line in LINES:
        wanted = Requirement(line).specifier.contains(version, prereleases=True)
        assert requirement(line).allows(version) is wanted, line


def test_what_the_metadata_do_not_use_is_refused() -> None:
    for line in ("torch~=2.6", "torch>2", "torch<3; python_version < '3.12'", "torch @ https://x.org/torch.whl"):
        with pytest.raises(ValueError, match="not understood"):
            requirement(line)
