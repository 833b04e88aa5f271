"""Secrets in what is printed and recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.utils.console import command_line
from nemo_upcycle.utils.masking import MASK, is_secret, masked, masked_text, write_private


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "my_token"])
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)
    assert masked({name: "abc", "HF_HOME": "/hf"}) == {name: MASK, "HF_HOME": "/hf"}


@pytest.mark.parametrize("name", ["HF_HOME", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "http_proxy"])
def test_names_of_other_variables(name: str) -> None:
    assert not is_secret(name)


@pytest.mark.parametrize(
    "text",
    [
        "HF_TOKEN=abc",
        "{HF_TOKEN: abc, B: c}",
        "{'HF_TOKEN': 'abc', 'B': 'c'}",
        '{"HF_TOKEN":"abc"}',
        'export HF_TOKEN="a \\"abc"\ntrue',
        "export A=1 HF_TOKEN='x abc y'; true",
        "{HF_TOKEN: x abc}",
        "HF_TOKEN=x'a'abc",
    ],
)
def test_value_of_a_secret_is_in_no_text(text: str) -> None:
    assert "abc" not in masked_text(text)
    assert "HF_TOKEN" in masked_text(text)


def test_command_line_is_kept_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["run.executor.env_vars={HF_TOKEN: hf_abc, A: b}", "run.executor.stages.data.env_vars={MY_KEY: x y}"]
    monkeypatch.setattr("sys.argv", ["nemo", "upcycle", "tokenizer=/t", "sources.web.tokens=5", *words])
    line = command_line()
    assert "hf_abc" not in line
    assert "x y" not in line
    for kept in ("tokenizer=/t", "web.tokens=5", "A: b"):
        assert kept in line


@pytest.mark.parametrize("private", [True, False])
def test_private_file_is_its_owners_alone_from_the_first_byte(tmp_path: Path, private: bool) -> None:
    path = tmp_path / "a.sh"
    path.write_text("before")
    path.chmod(0o644)
    write_private(path, "text", private=private)
    assert path.read_text() == "text"
    assert (path.stat().st_mode & 0o044 == 0) is private
