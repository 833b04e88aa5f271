"""Secrets are masked in output and records."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nemo_upcycle.utils.command_line import CommandLine
from nemo_upcycle.utils.masking import MASK, is_secret, masked, masked_text, without_secrets, write_private


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "my_token", "MY_PWD", "DB_PASS"]
)
def test_names_of_secrets(name: str) -> None:
    assert masked({name: "abc", "HF_HOME": "/hf"}) == {name: MASK, "HF_HOME": "/hf"}


def test_names_of_other_variables() -> None:
    names = ("HF_HOME", "TOKENIZERS_PARALLELISM", "http_proxy", "PWD", "OLDPWD", "AUTHOR")
    assert not any(map(is_secret, names))


@pytest.mark.parametrize(
    "text",
    [
        "HF_TOKEN=abc",
        "{'HF_TOKEN': 'abc', 'B': 'c'}",
        'export HF_TOKEN="a \\"abc"\ntrue',
        "export A=1 HF_TOKEN='x abc y'; true",
        "{HF_TOKEN: x abc}",
        "HF_TOKEN=x'a'abc",
    ],
)
def test_value_of_a_secret_is_in_no_text(text: str) -> None:
    assert "abc" not in masked_text(text)
    assert "HF_TOKEN" in masked_text(text)


_SECRETS = (
    "hf_" + "aB3" * 11,
    "sk-proj-" + "x" * 24,
    "ghp_" + "a1" * 18,
    "github_pat_" + "A_b" * 9,
    "glpat-" + "a" * 20,
    "xoxb-123456789012-abc",
    "AKIA" + "A" * 16,
    "nvapi-" + "a-_" * 9,
)


@pytest.mark.parametrize("secret", _SECRETS)
def test_tokens_are_known_by_what_they_begin_with(secret: str) -> None:
    for text in (secret, f"A={secret}", f"run --with '{secret}'; true", f"https://{secret}@host/x"):
        assert secret not in without_secrets(text)
        assert without_secrets(text) == text.replace(secret, MASK)
        assert masked({"HARMLESS": text}) == {"HARMLESS": text.replace(secret, MASK)}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgres://u:pw@h/db", "postgres://***@h/db"),
        ("docker://user:pw@reg#image:tag", "docker://***@reg#image:tag"),
        ("a=https://t:p@ss@h:80/x, s3://b/c", "a=https://***@h:80/x, s3://b/c"),
        ("https://h/a.jsonl?token=abc", "https://h/a.jsonl?token=***"),
        ("'https://h/a?part=1&api_key=a%2Fb', x", "'https://h/a?part=1&api_key=***', x"),
        ("s3://b/a?X-Amz-Credential=a%2Fs3&X-Amz-Signature=0f", "s3://b/a?X-Amz-Credential=***&X-Amz-Signature=***"),
        ("https://b/c?sv=1&sig=a%2Bb%3D&se=2", "https://b/c?sv=1&sig=***&se=2"),
        ("gs://b/a?GoogleAccessId=me&Signature=a/b+c=", "gs://b/a?GoogleAccessId=me&Signature=***"),
    ],
)
def test_addresses_lose_user_and_password(text: str, shown: str) -> None:
    assert without_secrets([{"at": (text,), text: 1}]) == [{"at": (shown,), shown: 1}]


@pytest.mark.parametrize(
    "text",
    [
        "ssh://git@host/x",
        "s3://b/part-?.jsonl",
        "https://h/a?part=1&author=me&tokenizer=b",
        "https://host:80/a@b",
        "https://h/?at=a:b@c",
        "docker://reg#a:b",
        "hf_checkpoint_of_a_model",
        "disk-usage-of-all-the-folders",
        "NVIDIA's nvapi-x",
    ],
)
def test_what_is_no_secret_is_shown(text: str) -> None:
    assert without_secrets(text) == text


def test_command_line_is_kept_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["run.executor.env_vars={HF_TOKEN: hf_abc, A: b}", "run.executor.stages.data.env_vars={MY_KEY: x y}"]
    monkeypatch.setattr("sys.argv", ["nemo", "upcycle", "tokenizer=/t", "sources.web.tokens=5", *words])
    sys.argv.append("run.executor.container_image=docker://me:pw@reg#image")
    line = str(CommandLine.typed())
    assert [words for words in ("me:pw", "hf_abc", "x y") if words in line] == []
    assert all(kept in line for kept in ("tokenizer=/t", "web.tokens=5", "A: b"))


def test_a_file_with_a_secret_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.sh"
    path.touch(mode=0o644)
    write_private(path, "--container-image docker://me:pw@reg#image")
    assert path.stat().st_mode & 0o044 == 0
