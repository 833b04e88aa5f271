"""Every field of a model's configuration is in one table; refused and unknown fields are named."""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter
from typing import Any

import pytest

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models import config_fields
from nemo_upcycle.models.config_fields import check_fields, meanings, table


pytestmark = pytest.mark.usefixtures("megatron")
REFUSED = [name for fields in table()["refused"].values() for name in fields]


def _config(**changes: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=2, normalization="RMSNorm")
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def test_every_field_of_megatron_and_nemo_is_in_the_table() -> None:
    from megatron.core.transformer.transformer_config import MLATransformerConfig
    from nemo.collections.llm.gpt.model.base import GPTConfig

    names = {field.name for kind in (MLATransformerConfig, GPTConfig) for field in dataclasses.fields(kind)}
    assert not names - meanings().keys()


def test_a_field_is_in_the_table_once() -> None:
    counted = Counter(name for kinds in table().values() for names in kinds.values() for name in names)
    assert not [name for name, times in counted.items() if times > 1]


@pytest.mark.parametrize("place", [*table()["handled"], *table()["inexact"]])
def test_what_handles_a_field_exists(place: str) -> None:
    module, _, name = place.rpartition(".")
    assert callable(getattr(importlib.import_module(f"nemo_upcycle.{module}"), name))


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_field_is_named_with_the_reason(name: str) -> None:
    with pytest.raises(SpecError, match=rf"model\.config\.{name} is other; expected .+ \(.+\)\. Set it"):
        check_fields(_config(**{"num_moe_experts": 4, name: "other"}))


def test_fields_of_experts_are_checked_value_by_value() -> None:
    name = "moe_router_load_balancing_type"
    check_fields(_config(**{name: "sinkhorn"}))
    check_fields(_config(**{"num_moe_experts": 4, name: ["aux_loss", "global_aux_loss"]}))
    for value in ("sinkhorn", ["aux_loss", "sinkhorn"]):
        with pytest.raises(SpecError) as caught:
            check_fields(_config(**{"num_moe_experts": 4, name: value}))
        assert (caught.value.field, caught.value.got) == (f"model.config.{name}", value)


def test_a_newer_megatrons_field_must_be_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_run import Config

    known = {name: meaning for name, meaning in meanings().items() if name not in ("test_mode", "flash_decode")}
    monkeypatch.setattr(config_fields, "meanings", lambda: known)
    check_fields(_config())
    recipe = Config(type(_config()), num_layers=2, normalization="RMSNorm", test_mode=True)
    for config in (_config(test_mode=True), recipe):
        with pytest.raises(SpecError, match=r"model\.config\.test_mode is True: .*does not know"):
            check_fields(config)


def test_knows_what_newer_megatron_enables_with_fused_experts() -> None:
    """Megatron-Core 0.20 enables moe_use_grouped_tensor by itself, so no fix could disable it."""
    kind = dataclasses.make_dataclass("Newer", [("moe_use_grouped_tensor", bool, False)], bases=(type(_config()),))
    config = kind(num_layers=2, hidden_size=8, num_attention_heads=2, normalization="RMSNorm", num_moe_experts=4)
    config.moe_use_grouped_tensor = config.moe_grouped_gemm = config.use_transformer_engine_op_fuser = True
    check_fields(config)
    config.moe_single_grouped_weight = True
    with pytest.raises(SpecError, match=r"model\.config\.moe_single_grouped_weight is True"):
        check_fields(config)
