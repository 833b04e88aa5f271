"""A user's names are values in every written file, and never code, keys, headings or tags."""

from __future__ import annotations

import ast
import io
import json
import re
import shlex
import subprocess
import sys
import tokenize
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from nemo_upcycle.cli.start.choices import Choices, Wanted, choose
from nemo_upcycle.cli.start.files import blend_text, recipe_text, run_command
from nemo_upcycle.cli.start.parent import FoundParent
from nemo_upcycle.cli.start.texts import Texts
from nemo_upcycle.convert.model_card import CardText, add_section, spec_fact, write_card
from nemo_upcycle.data.blend import read_blend
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.planning.hardware import known_shape
from nemo_upcycle.reporting.grid_table import render_table
from nemo_upcycle.reporting.html import render_html
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.command_line import CommandLine
from nemo_upcycle.utils.conf import read_conf
from nemo_upcycle.utils.files import MODEL_MARKER, read_json, write_json
from tests.hostile import HOSTILE
from tests.unit.reporting.test_html import Page


PLAIN = "plain"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": 256, "rms_norm_eps": 1e-5, "max_position_embeddings": 64},
}
hostile = pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in HOSTILE.items()])
#: The hostile texts without surrogates, because users' files are valid Unicode.
words = pytest.mark.parametrize(
    "text", [pytest.param(text, id=name) for name, text in HOSTILE.items() if name != "surrogate"]
)


@cache
def _usual(trainer: str, gpus: int) -> tuple[FoundParent, Choices]:
    parent, texts = FoundParent("", known_shape("llama3_8b"), None), Texts({}, 2_000_000, 2 * 10**9, {})
    return parent, choose(parent, texts, trainer, Wanted({}, gpus=gpus, gpu="h100" if gpus else None))


def _chosen(text: str, trainer: str, gpus: int) -> tuple[FoundParent, Choices]:
    parent, made = _usual(trainer, gpus)
    fields = {"num_experts": 8, "router_init": "prompts", "router_prompts": text}
    named = replace(made, suite=f"/suites/{text}.yaml", spec_fields=fields)
    return replace(parent, address=f"/models/{text}"), named


class _Blank(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant(type(node.value).__name__)


def _comments(code: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


@pytest.mark.parametrize(("trainer", "gpus"), [("nemo", 0), ("bridge", 64)])
@hostile
def test_a_recipe_has_names_as_values_alone(text: str, trainer: str, gpus: int) -> None:
    code, usual = (recipe_text(*_chosen(name, trainer, gpus)) for name in (text, PLAIN))
    tree, expected = ast.parse(code), ast.parse(usual)
    assert ast.get_docstring(tree) == ast.get_docstring(expected)
    assert _comments(code) == _comments(usual)
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert {f"/models/{text}", text} <= strings
    assert ast.dump(_Blank().visit(tree)) == ast.dump(_Blank().visit(expected))
    assert not set("\u202e\u2066\x1b\udcff") & set(code)


@words
def test_a_blend_names_the_same_texts(text: str, tmp_path: Path) -> None:
    _, choices = _chosen(text, "nemo", 0)
    source = {"train": [f"/texts/{text}"], "options": {"text_key": text}}
    (tmp_path / "blend.yaml").write_text(blend_text(Texts({"texts": source}, 1, 1, {}), choices), encoding="utf-8")
    found = read_blend(tmp_path / "blend.yaml", [f"tokenizer={tmp_path}"]).config.sources["texts"]
    assert (found.train, found.options) == (source["train"], source["options"])


@words
def test_commands_are_words_of_a_shell(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, choices = _chosen(text, "bridge", 0)
    command = str(run_command(Path(f"runs/{text}"), parent, choices, is_here=True))
    monkeypatch.setattr(sys, "argv", ["nemo", f"dir={text}", text])
    typed = str(CommandLine.typed())
    assert f"dense={parent.address}" in shlex.split(command)
    assert shlex.split(typed)[-2:] == [f"dir={text}", text]
    for line in (command, typed):
        assert not subprocess.run(["bash", "-n"], input=line.encode(), capture_output=True, check=False).stderr


def _shown(text: str) -> str:
    return re.sub(
        "[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\N{REPLACEMENT CHARACTER}", " ".join(text.split())
    )


def _markdown(text: str) -> tuple[list[str], list[list[str]], set[str]]:
    """Return the headings, the cells of the table rows, and the kinds of tokens."""
    tokens = MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(text)
    headings, rows, kinds = [], list[list[str]](), set()
    for number, token in enumerate(tokens):
        inside = token.children or []
        kinds |= {token.type, *(child.type for child in inside)}
        if token.type == "heading_open":
            headings.append(token.tag)
        elif token.type == "tr_open":
            rows.append([])
        elif token.type in ("td_open", "th_open"):
            rows[-1].append("".join(child.content for child in tokens[number + 1].children or []))
    return headings, rows, kinds


def _card(text: str, folder: Path) -> tuple[dict[str, Any], str]:
    parents = [folder / name for name in ("a", "b")]
    inherited = {"license": text, "license_name": text, "license_link": text, "language": [text], "base_model": text}
    for parent, licence in zip(parents, (text, f"{text}2"), strict=True):
        parent.mkdir(parents=True)
        write_json(parent / "config.json", CONFIG)
        front = yaml.safe_dump(inherited | {"license": licence})
        (parent / "README.md").write_text(f"---\n{front}---\n", encoding="utf-8")
    spec = UpcycleSpec(num_experts=8, router_init="prompts", router_prompts=f"/x/{text.replace('/', '')}")
    arch, facts = read_architecture(parents[0]).upcycled(spec), spec_fact(spec) | {text: text}
    card = CardText(title=text, tool=text, facts=facts, notes=[text], parent=f"a://{text}")
    for count in (2, 1):
        write_card(folder, parents[:count], arch, card)
    (folder / MODEL_MARKER).write_text("{}")
    add_section(folder, "Scores", "fine")
    _, front, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


@words
def test_a_card_shows_names_as_text(text: str, tmp_path: Path) -> None:
    front, body = _card(text, tmp_path / "hostile")
    _, usual = _card(PLAIN, tmp_path / "usual")
    assert {front[key] for key in ("license", "license_name", "base_model")} == {text}
    assert front["language"] == [text]
    (headings, rows, kinds), (expected, cells, known) = map(_markdown, (body, usual))
    assert headings == expected
    assert list(map(len, rows)) == list(map(len, cells))
    assert [_shown(text)] * 2 in rows
    assert kinds <= known
    assert body.partition("```python")[2].partition("```")[0] == usual.partition("```python")[2].partition("```")[0]


def _tags(markdown: str) -> list[str]:
    return [tag for tag, _ in Page(render_html(markdown, {})).tags if tag != "span"]  # a span only wraps a number


def _grid(text: str) -> dict[str, Any]:
    mean = {"value": 1.0, "low": None, "high": None}
    arm = {"seeds": [1], "unscored_seeds": [1], "tokens": 1, "flops": 1.0, "start": mean, "bits_per_byte": mean}
    arm |= {"rank_hours": 1.0, "routers": {}, "about": text, "sources": {}}
    named = {"grid": text, "about": text, "arms": {text: arm}, "differences": {}, "margin": 0.01}
    return named | {"missing": [text]}


@hostile
def test_a_grid_shows_names_as_text(text: str) -> None:
    shown, usual = (render_table(_grid(name)) for name in (text, PLAIN))
    headings, rows, kinds = _markdown(shown)
    expected, cells, known = _markdown(usual)
    assert (headings, list(map(len, rows))) == (expected, list(map(len, cells)))
    assert (rows[1][0], rows[1][-1]) == (_shown(text), _shown(text))
    assert kinds <= known
    assert _tags(shown) == _tags(usual)


@hostile
def test_json_is_read_back(text: str, tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {text: [text, {"license": text}]})
    assert read_json(tmp_path / "manifest.json") == {text: [text, {"license": text}]}


@hostile
def test_settings_of_a_run_are_read_back(text: str, tmp_path: Path) -> None:
    launch = pytest.importorskip("nemo_upcycle.pipeline.launch")
    from nemo_upcycle.trainers.bridge.training import BridgeTraining

    made = BridgeTraining(text, (f"name={text}", "lr=1e-05", 'x="[1, null]"', "y=[1, null]"))
    launch._write_recipes(tmp_path, SimpleNamespace(trainings={"pretrain": made}))
    found = yaml.safe_load((tmp_path / "recipes/pretrain.yaml").read_text(encoding="utf-8"))
    assert list(found) == ["recipe", "nodes", "ranks_per_node", "name", "lr", "x", "y"]
    assert (found["lr"], found["x"], found["y"]) == (1e-05, "[1, null]", [1, None])
    assert found["recipe"] == found["name"]


@words
def test_copies_of_a_users_files_are_read_back(text: str, tmp_path: Path) -> None:
    from nemo_upcycle.utils.conf import conf_text

    (tmp_path / "mine.yaml").write_text(conf_text({"a": text, "b": [{"c": text}]}), encoding="utf-8")
    assert read_conf("data", tmp_path / "mine.yaml", "blend").content == {"a": text, "b": [{"c": text}]}


@words
def test_a_manifest_holds_names_as_values(text: str) -> None:
    pytest.importorskip("nemo_run")
    from nemo_upcycle.pipeline.executors.jobs import Job
    from nemo_upcycle.pipeline.executors.kubernetes import KubernetesScheduler
    from nemo_upcycle.pipeline.executors.kubernetes_settings import KubernetesExecutor

    job = Job("pretrain", Path(f"/runs/{text[:200]}"), ("python", "-m", "x", text), nodes=2, ranks_per_node=2)
    settings = KubernetesExecutor(image=text, env_vars={"A": text}, claim="runs", mount_path="/runs")
    (rendered,) = KubernetesScheduler(settings).render(job).values()
    trainer = yaml.safe_load(rendered)["spec"]["trainer"]
    assert (trainer["image"], trainer["command"][-1]) == (text, text)
    assert {"name": "A", "value": text} in trainer["env"]


@words
def test_batch_scripts_quote_the_runs_folder(text: str) -> None:
    pytest.importorskip("nemo_run")
    from nemo_upcycle.pipeline.executors.jobs import Job
    from nemo_upcycle.pipeline.executors.slurm_script import setup_lines

    folder = Path(f"/runs/{text}")
    job = Job("pretrain", folder, ("python",), is_training=True, is_resumable=True)
    script = "\n".join(setup_lines(job, 60))
    assert not subprocess.run(["bash", "-n"], input=script.encode(), capture_output=True, check=False).stderr
    assert shlex.split(script.partition("stage=")[2].partition('\nrm -f "$stage')[0]) == [str(folder / "pretrain")]


@hostile
def test_the_files_of_a_suites_tasks_are_read_back(text: str, tmp_path: Path) -> None:
    from nemo_upcycle.data.suites.local_tasks import LOCAL_TASKS, write_task

    row = {"question": text.replace("\udcff", "")}
    write_task(tmp_path, Path(f"/suites/{text}"), task := next(iter(LOCAL_TASKS)), 0, [row])
    (line,) = (tmp_path / f"{task}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert json.loads(line) == row
    defined = yaml.safe_load((tmp_path / f"{task}.yaml").read_text(encoding="utf-8"))
    assert defined["dataset_kwargs"]["data_files"]["test"] == str(Path(f"/suites/{text}/{task}.jsonl"))
