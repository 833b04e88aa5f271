"""Configurations are read by name or by path."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.conf import Conf, as_dataclass, overridden, read_conf


def test_the_packages_file_has_a_name_a_users_a_path(tmp_path: Path) -> None:
    content, path, folder = read_conf("evaluation", "demo", "suite")
    assert (path.name, content["local"], folder) == ("demo.yaml", True, Path())
    mine = tmp_path / "mine.yml"
    mine.write_text("a: 1\nb: ${a}\n", encoding="utf-8")
    assert read_conf("evaluation", mine, "suite") == ({"a": 1, "b": 1}, mine, tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [", "is not valid YAML: while parsing"),
        (b"a: ${b}", "is not valid YAML: Interpolation key 'b' not found"),
        (b"- 1", "holds a list instead of keys"),
        (b"# mine\n", "holds nothing instead of keys"),
        (b"\xff", "is not UTF-8 text ('utf-8' codec"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_refuses_what_is_not_a_yaml_mapping(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UpcycleError) as caught:
        read_conf("evaluation", path, "suite")
    assert str(caught.value).startswith(f"Suite {path} {said}")


def test_a_few_aliases_and_references_are_written_out(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, '${b.y}', '${.[0].x}']\n1: {z: '${c[1]}'}", encoding="utf-8"
    )
    expected = {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, 2, 1], "1": {"z": 2}}
    assert read_conf("evaluation", path, "suite").content == expected


@dataclass
class Inner:
    share: float = 0.5
    on: bool = True


@dataclass
class Outer:
    names: list[str]
    parts: dict[str, Inner] = field(default_factory=dict)
    count: int | None = None
    size: int | str = 8
    more: dict[str, Any] = field(default_factory=dict)


def test_values_become_those_of_the_dataclass() -> None:
    content = {"names": ["a", 1990], "parts": {"x": {"share": 1}}, "size": "auto", "more": {"deep": [{"a": None}]}}
    made = as_dataclass("mine.yaml", content, Outer, "data")
    assert made == Outer(["a", "1990"], {"x": Inner(1.0)}, None, "auto", {"deep": [{"a": None}]})
    assert isinstance(made.parts["x"].share, float)


def test_what_is_left_blank_is_the_default() -> None:
    content = {"names": [], "parts": {"x": {"share": None}}, "count": None, "size": None, "more": None}
    assert as_dataclass("mine.yaml", content, Outer, "data") == Outer([], {"x": Inner()})


def test_a_secret_in_a_mistake_is_not_shown() -> None:
    @dataclass
    class Site:
        variables: dict[str, str]

    for given in ({"HF_TOKEN": ["hf_abc"]}, "HF_TOKEN=hf_abc"):
        with pytest.raises(UpcycleError) as caught:
            as_dataclass("mine.yaml", {"variables": given}, Site, "data")
        assert "***" in str(caught.value)
        assert "hf_abc" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "where", "got", "expected"),
    [
        ({"names": "a.txt"}, "names", "'a.txt'", "a list, each text. Write ['a.txt']"),
        ({"names": [True]}, "names[0]", "true", 'text. Put it in quotes: "true"'),
        ({"names": [None]}, "names[0]", "null", 'text. Put it in quotes: ""'),
        ({}, "names", "missing", "a list"),
        ({"names": [], "parts": {"x": 3}}, "parts.x", "3", "keys"),
        ({"names": [], "parts": {"x": {"share": True}}}, "parts.x.share", "true", "a number"),
        ({"names": [], "parts": {"x": {"on": "maybe"}}}, "parts.x.on", "'maybe'", "true or false"),
        ({"names": [], "count": 1.5}, "count", "1.5", "a whole number or null"),
        ({"names": [], "size": [1]}, "size", "[1]", "a whole number or text"),
    ],
)
def test_names_key_value_and_type_of_a_wrong_value(
    content: dict[str, Any], where: str, got: str, expected: str
) -> None:
    with pytest.raises(UpcycleError) as caught:
        as_dataclass("mine.yaml", content, Outer, "data")
    assert f"mine.yaml: {where} is {got}; expected {expected}" in str(caught.value)


@pytest.mark.parametrize("name", ["dmo", "../evaluation/demo", "", Path("evaluation/demo")])
def test_what_is_neither_a_name_nor_a_file_is_refused(name: str | Path) -> None:
    with pytest.raises(UpcycleError) as caught:
        read_conf("evaluation", name, "suite")
    assert (caught.value.field, caught.value.got) == ("suite", str(name))


ENVIRONMENT = ("${oc.env:SECRET}", "a ${ oc.env:SECRET,none}", "${oc.decode:'${oc.env:SECRET}'}", "${oc.select:a}")


@pytest.mark.parametrize("kind", ["data", "chat", "evaluation", "ablations"])
@pytest.mark.parametrize("value", ENVIRONMENT)
def test_only_files_of_executors_read_the_environment(
    kind: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hush")
    (path := tmp_path / "mine.yaml").write_text(f'sources: {{web: {{license: "{value}"}}}}', encoding="utf-8")
    with pytest.raises(UpcycleError) as refused:
        read_conf(kind, path, "file")
    assert refused.value.subject == f"file {path}: sources.web.license"
    assert "hush" not in str(refused.value)
    with pytest.raises(UpcycleError, match="only an executor's file may read the environment"):
        overridden(Conf({"a": "b"}, path, tmp_path), [f"license={value}"])


def test_the_file_of_an_executor_reads_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCOUNT", "mine")
    (path := tmp_path / "site.yaml").write_text("account: ${oc.env:ACCOUNT}", encoding="utf-8")
    assert read_conf("executors", path, "executor").content == {"account": "mine"}
