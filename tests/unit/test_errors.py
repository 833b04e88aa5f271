"""An error is data; its text is made of it."""

from __future__ import annotations

import pickle

import pytest

from nemo_upcycle.errors import CheckpointError, SpecError, UnfinishedError, UpcycleError


TOP_K = SpecError(field="top_k", got="<9>", expected="1 to <num_experts> (8)", fix="set <top_k>=2.")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (UpcycleError("no model"), "no model"),
        (
            CheckpointError("a <b>", got=None, expected=None, fix="see <c>."),
            "a <b>: got None, expected None. Fix: see <c>.",
        ),
        (TOP_K, "top_k: got <9>, expected 1 to num_experts (8). Fix: set top_k=2."),
        (
            SpecError.unknown("<m>", "copi", {"noise", "copy"}),
            "<m> 'copi' does not exist. Did you mean 'copy'? Valid: copy, noise.",
        ),
    ],
)
def test_an_error_is_rendered_from_its_data(error: UpcycleError, text: str) -> None:
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == text


def test_a_front_end_names_fields_as_its_user_typed_them() -> None:
    options = {"top_k": "--top-k", "num_experts": "--experts"}
    typed = TOP_K.renamed(lambda name: options[name])
    assert (type(typed), typed.field, typed.got) == (SpecError, "--top-k", "<9>")
    assert str(typed) == "--top-k: got <9>, expected 1 to --experts (8). Fix: set --top-k=2."
    nested = TOP_K.renamed(lambda name: f"spec.{name}").renamed(lambda name: f"pretrain.{name}")
    assert str(nested).startswith("pretrain.spec.top_k: got <9>, expected 1 to pretrain.spec.num_experts (8)")
    assert str(TOP_K) == "top_k: got <9>, expected 1 to num_experts (8). Fix: set top_k=2."


def test_an_error_without_a_field_keeps_its_words() -> None:
    error = UnfinishedError("stage <data>", got="<x>", expected="<y>", fix="<z>")
    assert error.renamed(str.upper) is error
    assert str(error.within("mine.yaml")) == "mine.yaml: stage <data>: got <x>, expected <y>. Fix: <z>."
    assert error.within("mine.yaml").exit_status == 1
