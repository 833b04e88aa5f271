"""Configurations are read by name or by path."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.conf import read_conf


def test_reads_a_file_of_the_package_by_name_and_a_users_by_path(tmp_path: Path) -> None:
    content, path, folder = read_conf("evaluation", "demo", "suite")
    assert (path.name, content["local"], folder) == ("demo.yaml", True, Path())
    mine = tmp_path / "mine.yml"
    mine.write_text("a: 1\nb: ${a}\n", encoding="utf-8")
    assert read_conf("evaluation", mine, "suite") == ({"a": 1, "b": 1}, mine, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [("a: [", "expected valid YAML"), ("- 1", "got list, expected keys"), ("a: ${b}", "expected valid YAML")],
)
def test_refuses_what_is_not_a_yaml_mapping(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UpcycleError, match=message):
        read_conf("evaluation", path, "suite")


def test_refuses_what_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    with pytest.raises(
        UpcycleError, match=r"suite .*: got No such file or directory, expected a YAML file\. Fix: check"
    ):
        read_conf("evaluation", path, "suite")
    path.write_bytes(b"\xff")
    with pytest.raises(UpcycleError, match=r"suite .*: got 'utf-8' codec .*, expected a YAML file.*iconv"):
        read_conf("evaluation", path, "suite")


def test_an_unknown_name_gets_the_closest_one() -> None:
    with pytest.raises(UpcycleError, match=r"suite 'dmo' does not exist\. Did you mean 'demo'"):
        read_conf("evaluation", "dmo", "suite")


@pytest.mark.parametrize("name", ["../evaluation/demo", "./sotu", "", Path("data/sotu")])
def test_a_path_without_a_suffix_is_not_a_name(name: str | Path) -> None:
    with pytest.raises(UpcycleError, match=r"blend '.*' does not exist"):
        read_conf("data", name, "blend")
