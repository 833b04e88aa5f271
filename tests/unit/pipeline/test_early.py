"""Command-line mistakes that are answered before Megatron-Bridge is imported."""

from __future__ import annotations

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.early import refuse_early


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--factory llama3_8b_e8t3", "Did you mean 'llama3_8b_e8t2'"),
        ("-f llama32_1b_e8t2_sft", "is only for NeMo"),
        ("--factory=llama3_8b_e8t2 --until dat", "--until: stage"),
        ("--factory llama3_8b_e8t2 --only data --from data", "--only cannot be combined with --from or --until"),
        ("--factory llama3_8b_e8t2 --dryrunn", "Did you mean '--dryrun'"),
    ],
)
def test_a_mistake_is_refused_by_name(line: str, message: str) -> None:
    with pytest.raises(UpcycleError, match=message):
        refuse_early(line.split())


@pytest.mark.parametrize(
    "line",
    [
        "--factory llama3_8b_e8t2(dense='x') --until data --dryrun --render out dir=runs/x",
        "--factory my.module.chain --yes",
        "recipe=my:own dense=x gpus=2 -v",
    ],
)
def test_what_is_right_is_left_to_the_command(line: str) -> None:
    refuse_early(line.split())
