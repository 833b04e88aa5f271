"""Write the tables in the documentation that are generated from code, and count the words of its pages.

    python -m benchmarks.doc_tables          fills docs/*.md between `<!-- NAME table -->` and `<!-- end of table -->`
    python -m benchmarks.doc_tables --check  only names the pages that differ; exit status 1 if any page differs
    python -m benchmarks.doc_tables --words  counts the words of each page and of all pages, without these tables

The memory in the tables comes from `nemo-upcycle plan`.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

from nemo_upcycle.cli.main import COMMANDS, examples_of
from nemo_upcycle.cli.main import main as tool
from nemo_upcycle.models import families
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.compatibility import ANY, Row, runtimes
from nemo_upcycle.planning.hardware import known_shape
from nemo_upcycle.planning.recipe_table import KnownRecipe, Run
from nemo_upcycle.recipes import known_recipe, known_recipes, modules
from nemo_upcycle.spec import UpcycleSpec


DOCS = Path(__file__).parents[1] / "docs"
TABLE = re.compile(r"(<!-- (\w+) table -->\n).*?(<!-- end of table -->)", re.DOTALL)
#: Megatron-Bridge's name of a precision -> the planner's name. The next constants are options of `nemo-upcycle plan`.
PRECISIONS = {"": "bf16", "fp8cs": "fp8-current", "fp8sc": "fp8-blockwise", "fp8mx": "mxfp8"}
BF16 = ["--grad-dtype", "bf16"]
PADDED, HYBRIDEP = (
    ["--capacity-factor", "1", "--pad-to-capacity"],
    ["--capacity-factor", "0", "--dispatcher", "hybridep"],
)


def table(headings: str, rows: Iterator[tuple[Any, ...]]) -> str:
    """Return rows as a Markdown table; `headings` are separated by commas."""
    lines = [headings.split(", "), ["---"] * len(headings.split(", ")), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def models() -> Iterator[tuple[str, ModuleType, KnownRecipe]]:
    """Yield name, file and recipe of each upcycled model in `recipes/` that has a plan."""
    for model, file in modules().items():
        if f"{model}_e8t2" in known_recipes():
            yield model, file, known_recipe(f"{model}_e8t2")


def model_rows() -> Iterator[tuple[Any, ...]]:
    """Yield a row for each model, with the names of its recipes."""
    for model, _, known in models():
        names = [f"`{name}`" for name in (f"{model}_e8t2", f"{model}_e8t2_sft") if name in known_recipes()]
        where = "NeMo, Bridge" if "nemo" in known.trainers else "Bridge"
        sizes = f"{known.arch.total_params / 1e9:.2f}B parameters, {known.arch.active_params / 1e9:.2f}B active"
        yield known.title, ", ".join(names), sizes, where, f"`{known.inputs['dense']}`"


def run_rows() -> Iterator[tuple[Any, ...]]:
    """Yield a row for each training of these models, with the memory of the fullest GPU.

    The memory is given with recomputed MoE layers, without recomputation, or both.
    """
    for model, file, known in models():
        for gpu, runs in file.LAYOUTS.items():
            for kind, run in runs.items():
                recomputed = kind in ("e8t2", "hybridep") and known.h100
                gib = [_gib(model, gpu, kind, run, "moe")] if recomputed else []
                gib += [_gib(model, gpu, kind, run, "none")] if not gib or (kind == "e8t2" and gpu == "h100") else []
                layout = f"{run} EP8".removeprefix("data parallelism alone ") if _ep(kind, run) > 1 else str(run)
                yield (
                    f"`{model}`",
                    gpu.upper(),
                    kind,
                    run.precision or "bf16",
                    run.gpus,
                    layout,
                    ", later ".join(gib),
                )


def _ep(kind: str, run: Run) -> int:
    return 8 if run.gpus > 1 and kind != "dense" else 1


def _gib(model: str, gpu: str, kind: str, run: Run, recompute: str) -> str:
    """Return the memory of the fullest GPU (GiB), and the planner's verdict unless it is `fits`."""
    layout = f"tp={run.tp},pp={run.pp},vp={run.vp or 1},cp={run.cp},ep={_ep(kind, run)},mbs=1"
    name = f"{model}_{'dense_ct' if kind == 'dense' else 'e8t2'}"
    words = ["plan", "--recipe", name, "--gpus", str(run.gpus), "--gpu", gpu, "--layout", layout, "--json"]
    words += ["--recompute", recompute, "--precision", PRECISIONS[run.precision], "--backend", "bridge"]
    has_hybridep = kind == "hybridep" or (gpu == "gb200" and kind != "dense")
    words += BF16 if kind == "fast" else []
    words += HYBRIDEP if has_hybridep else PADDED if kind == "fast" else []
    with redirect_stdout(io.StringIO()) as answer:
        tool(words)
    found = json.loads(answer.getvalue())["rows"][0]
    return f"{found['memory_gib']['total']:.0f}" + ("" if found["fits"] == "fits" else f" ({found['fits']})")


def class_rows() -> Iterator[tuple[Any, ...]]:
    """Yield a row for each class of MoE models, with the features that this class does not support.

    Features that more than eight classes do not support are omitted.
    """
    plain = known_shape("llama3_8b").upcycled(UpcycleSpec(num_experts=8, top_k=2))
    limits = {family: _limits(family, plain) for family in families.targets()}
    common = [reason for reason in next(iter(limits.values())) if sum(reason in one for one in limits.values()) > 8]
    for family, reasons in limits.items():
        name = f"`{family.saved_as or family.hf_class}`{' with `enable_moe_block`' if family.saved_as else ''}"
        yield name, family.router_score, "; ".join(reason for reason in reasons if reason not in common)


def _limits(family: families.MoeFamily, arch: Architecture) -> list[str]:
    """List the limits of a class, without the limits on scores.

    A limit on shared experts is omitted if it applies to no model of the class.
    """
    shared = replace(arch, shared_ffn_size=arch.ffn_size)
    never = {name for name in ("shared experts", "no shared experts") if name in family.limits(arch)}
    never -= {name for one in (arch, shared) for name, holds in family.limits(one).items() if holds}
    return [reason for reason in family.limits(arch) if not reason.endswith(" scores") and reason not in never]


def tool_rows() -> Iterator[tuple[Any, ...]]:
    """Yield a row for each tool, with its purpose and its first example."""
    for name, what in COMMANDS.items():
        yield f"`{name}`", what, f"`{examples_of(name)[0]}`"


#: Result in the table of runtimes -> word for this result on the page.
RESULTS = {"same": "same", "option": "option", "other": "**other tokens**", "refused": "refused", "not run": "not run"}


def runtime_rows() -> Iterator[tuple[Any, ...]]:
    """Yield a row for each class of MoE models, and a row for all classes together, with a cell for each runtime."""
    shown = [(family.title, family.hf_class) for family in families.targets()]
    for title, hf_class in (*shown, ("any class", ANY)):
        yield title, *(_cell([row for row in one.rows if row.hf_class == hf_class], hf_class) for one in runtimes())


def _cell(rows: list[Row], hf_class: str) -> str:
    """Return the results of a class in a runtime: first for all its models, then for models with some property."""
    rows = rows or ([Row(hf_class, "not run")] if hf_class != ANY else [])
    return "; ".join(f"{row.where + ': ' if row.where else ''}{_result(row)}" for row in rows)


def _result(row: Row) -> str:
    because = f" ({row.because})" if row.because and row.result in ("option", "not run", "refused") else ""
    measured = "" if row.date or row.result == "not run" else ", by its source"
    return f"{RESULTS[row.result]}{measured}{because}"


def runtime_headings() -> str:
    """Return the headings of the table of runtimes, with the last day on which a row was measured."""
    return ", ".join(["class", *(f"{one.release} ({max(row.date for row in one.rows)})" for one in runtimes())])


def file_rows(folder: str) -> Iterator[tuple[Any, ...]]:
    """Yield a row for each YAML file in a folder of `conf`, with the first sentence of its comment."""
    for path in sorted((DOCS.parent / "conf" / folder).glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        text = " ".join(line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), lines))
        yield f"`{path.stem}`", text.split(". ")[0].rstrip(".")


TABLES: dict[str, Callable[[], str]] = {
    "models": lambda: table("model, recipes, upcycled, trainers, parent", model_rows()),
    "runs": lambda: table("model, GPU, run, precision, GPUs, layout, GiB", run_rows()),
    "classes": lambda: table("class, scores, does not hold", class_rows()),
    "runtimes": lambda: table(runtime_headings(), runtime_rows()),
    "suites": lambda: table("suite, what", file_rows("evaluation")),
    "blends": lambda: table("blend, what", file_rows("data")),
    "grids": lambda: table("grid, what", file_rows("ablations")),
    "tools": lambda: table("tool, what it does, an example", tool_rows()),
}


def pages() -> list[Path]:
    """List the pages that are at least partly written by hand."""
    return sorted(page for page in DOCS.glob("*.md") if page.name != "public.md")


def with_tables(text: str) -> str:
    """Return the text of a page with new tables."""
    return TABLE.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def words(page: Path) -> int:
    """Count the words of a page, including commands and code, without the generated tables.

    A word has at least one letter or digit, so bullets and the bars of tables are not words.
    """
    return len(re.findall(r"\S*[^\W_]\S*", TABLE.sub("", page.read_text(encoding="utf-8"))))


def main() -> None:
    """Write the tables, name the pages that differ, or print the numbers of words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--words", action="store_true", help="count")
    args = parser.parse_args()
    if args.words:
        print("\n".join(f"{words(page):6,} {page.name}" for page in pages()))
        print(f"{sum(map(words, pages())):6,} in all")
        return
    differing = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (made := with_tables(text)) != text:
            differing.append(page.name)
            if not args.check:
                page.write_text(made, encoding="utf-8")
    print("\n".join(differing))
    sys.exit(args.check and bool(differing))


if __name__ == "__main__":
    main()
