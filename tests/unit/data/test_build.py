"""A finished folder of data is known by what it was made from, whichever release noted that."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.data.blend import BlendConfig, SourceConfig
from nemo_upcycle.data.build import _is_done
from nemo_upcycle.data.finished import FORMAT
from nemo_upcycle.data.manifest import texts_of
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import MARKER, write_json


def test_settings_that_a_release_did_not_have_count_as_their_defaults(tmp_path: Path) -> None:
    config = BlendConfig({"talks": SourceConfig(["talks/*.txt"])}, seed=7)
    noted = {"format": FORMAT, "blend": texts_of(config), "strict": False}
    del noted["blend"]["pii"], noted["blend"]["sources"]["talks"]["on_hit"]
    write_json(tmp_path / MARKER, {"made_from": noted})
    now = {"format": FORMAT, "blend": texts_of(config), "strict": False}
    assert _is_done(tmp_path, now)
    config.pii = ["email"]
    with pytest.raises(UpcycleError, match=r"another blend's \(pii differ\)"):
        _is_done(tmp_path, now | {"blend": texts_of(config)})
