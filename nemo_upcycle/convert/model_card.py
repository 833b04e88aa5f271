"""The README.md of a Hugging Face folder that this package writes: the model's parents, and how it was made."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_upcycle.convert.hf_folder import tokenizer_file_names
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.compatibility import option_text
from nemo_upcycle.models.families import find_family
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.mapping import extra_params, hf_constants
from nemo_upcycle.package_info import __version__
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.conf import parse_yaml
from nemo_upcycle.utils.files import MODEL_MARKER, whole_file
from nemo_upcycle.utils.writers import code, literal, plain, table, yaml_text


CARD = "README.md"
_LICENCE = "## Licence"
#: Entries of a parent's card that are also valid for models made from the parent.
_INHERITED = ("license", "license_name", "license_link", "language")
_FROM_DENSE = (
    "upcycled from a dense model ([arXiv 2412.09952](https://arxiv.org/abs/2412.09952)): the experts are made from"
    " its feed-forward network."
)
_TEMPLATE = """---
{front}
---

# {title}

{made}{rows}

## Load it

```python
from transformers import {imported}
model = {hf_class}.from_pretrained(".", dtype="auto"{options})  # this folder, or its name on the hub
{tokenizer}```

{notes}{licence_title}

{licence}
"""


@dataclass(frozen=True, kw_only=True)
class CardText:
    """The texts of a model card.

    Args:
        title: name of the model.
        tool: command that wrote the model.
        facts: rows of the table: label -> value.
        notes: sentences on what is inexact, unknown or assumed.
        parent: address that the user gave for the first parent.
        options: further arguments of `from_pretrained` in transformers 5: name -> value.
    """

    title: str
    tool: str
    facts: Mapping[str, str]
    notes: Sequence[str] = ()
    parent: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)


def write_card(
    folder: Path, parents: Sequence[Path], arch: Architecture, card: CardText, *, whole_class: str = ""
) -> None:
    """Write the model card.

    Args:
        folder: folder of the model.
        parents: folders of the dense models; the first model provides everything except the experts.
        arch: architecture of the model.
        card: texts of the card.
        whole_class: class that holds the model and the parent's other parts; empty if the parent has no other parts.
    """
    family = find_family(arch.hf_class)
    loads_as, around = whole_class or (family.saved_as if family else "") or arch.hf_class, ""
    if whole_class:
        around = f"; its text model{'' if arch.hf_class == whole_class else f', {arch.hf_class}'}"
    names = [_hub_name(folder) for folder in parents]
    cards = [_front_matter(folder) for folder in parents]
    front = _front(names, cards, arch) | ({"pipeline_tag": "image-text-to-text"} if whole_class else {})
    addresses = [card.parent, *[None] * (len(parents) - 1)]
    rows = {
        "Made from": ", ".join(map(_called, parents, addresses, cards)),
        "Class": f"{loads_as}{around}: {arch.total_params:,} parameters, {arch.active_params:,} active per token",
        **_besides(arch),
        **card.facts,
        "Written by": f"{card.tool}, version {__version__}",
    }
    own = read_architecture(parents[0]).num_experts if arch.num_experts else None
    made = f"made from a parent with {own} experts, which were copied." if own else _FROM_DENSE
    made = f"A Mixture-of-Experts model ({arch.num_experts} experts, {arch.top_k} per token), {made}\n\n"
    has_tokenizer = any(name.startswith(("tokenizer", "vocab")) for name in tokenizer_file_names(parents[0]))
    text = _TEMPLATE.format(
        front=yaml_text(front).rstrip(),
        title=plain(card.title),
        made=made if arch.num_experts else "",
        rows=table(["", ""], rows.items(), words=1),
        imported=f"AutoTokenizer, {loads_as}" if has_tokenizer else loads_as,
        hf_class=loads_as,
        options=f", {option_text(card.options)}" if card.options else "",
        tokenizer='tokenizer = AutoTokenizer.from_pretrained(".")\n' if has_tokenizer else "",
        notes="\n".join(["## Notes", "", *(f"- {plain(note)}" for note in card.notes), "", ""]) if card.notes else "",
        licence_title=_LICENCE,
        licence=_licence(front, cards),
    )
    _write(folder / CARD, text)


def add_section(folder: Path, title: str, text: str) -> None:
    """Add a section above the licence to a card that this package wrote, or replace the section with the same title.

    If this package wrote no card, nothing happens. A folder that is a link to another place is not changed.

    Args:
        folder: folder of the model.
        title: title of the section.
        text: Markdown below the title.
    """
    path, heading = folder / CARD, f"## {title}\n"
    if folder.is_symlink() or not (folder / MODEL_MARKER).is_file() or not path.is_file():
        return
    parts = re.split(r"^(?=## )", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    parts = [part for part in parts if not part.startswith(heading)]
    place = next((number for number, part in enumerate(parts) if part.startswith(f"{_LICENCE}\n")), len(parts))
    parts.insert(place, f"{heading}\n{text}\n\n")
    _write(path, "".join(parts))


def _write(path: Path, text: str) -> None:
    with whole_file(path) as aside:  # half of a surrogate pair cannot be encoded, so it is replaced
        aside.write_text(text, encoding="utf-8", errors="replace")


def _besides(arch: Architecture) -> dict[str, str]:
    """Return a card row on the numbers in the files that are not parameters and do not change the function."""
    constants = sum(math.prod(shape) for shape in hf_constants(arch).values())
    copied = extra_params(arch) - constants
    told = []
    if copied:
        told.append(
            f"a copy of the embedding as the output layer ({copied:,} numbers), because not all servers share them"
        )
    if constants:
        told.append(f"{constants:,} zeros in tensors that the class has and the parent lacks")
    return {"Also in the files": "; ".join(told)} if told else {}


def training_facts(metrics: Path, step: int) -> dict[str, str]:
    """Read one step of a run's `metrics.jsonl` for a card, or return {} if the file does not have the step.

    Args:
        metrics: file to read.
        step: step number, from 1.
    """
    if not metrics.is_file():
        return {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
            if values["step"] == step:
                return {"Training": f"{step:,} steps, {values['tokens']:,} tokens, last loss {values['loss']:.4f}"}
        except (ValueError, KeyError, TypeError):
            continue
    return {}


def _front(names: list[str | None], cards: list[dict[str, Any]], arch: Architecture) -> dict[str, Any]:
    """Return the card's metadata in the form that the Hugging Face hub reads."""
    # If a parent has no name on the hub, the parent's card may name a base model. Then the base model is the nearest
    # model with a name on the hub.
    bases = [name or card.get("base_model") for name, card in zip(names, cards, strict=True)]
    flat = [base for one in bases for base in (one if isinstance(one, list) else [one]) if isinstance(base, str)]
    front: dict[str, Any] = {}
    if flat := list(dict.fromkeys(flat)):
        front["base_model"] = flat[0] if len(flat) == 1 else flat
    for key in _INHERITED:
        if cards[0].get(key) and all(card.get(key) == cards[0][key] for card in cards):
            front[key] = cards[0][key]
    tags = ["nemo-upcycle", *(["mixture-of-experts", "moe", "upcycling"] if arch.num_experts else [])]
    return {**front, "library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}


def _licence(front: dict[str, Any], cards: list[dict[str, Any]]) -> str:
    if "license" in front:
        name = front.get("license_name", front["license"])
        return f"The parent's licence: {plain(name)}. Its licence files, if any, are in this folder."
    if any("license" in card for card in cards):
        return "The parents have several licences: " + "; ".join(
            plain(card.get("license", "none named")) for card in cards
        )
    return "The parent's folder names no licence. See where the model came from."


def spec_fact(spec: UpcycleSpec) -> dict[str, str]:
    """Return a card row on how a model was upcycled: sizes, seed, and the fields that differ from their defaults."""
    always, default = ("num_experts", "top_k", "router_std", "seed"), UpcycleSpec()
    fields = {name: value for name, value in asdict(spec).items() if name in always or value != getattr(default, name)}
    for name in ("calibration", "expert_utility", "router_prompts"):  # a path is valid on one machine only
        if name in fields:
            fields[name] = Path(fields[name]).name
    return {
        "Upcycled by": code(f"UpcycleSpec({', '.join(f'{name}={literal(value)}' for name, value in fields.items())})")
    }


def _called(folder: Path, address: str | None, card: Mapping[str, Any]) -> str:
    """Return a parent's name for readers: its hub name or address, or otherwise its folder and its base model."""
    if name := _hub_name(folder):
        return name
    _, separator, rest = (address or "").partition("://")
    # A path is valid on one machine only, so only its last part is used.
    called = address if address and separator and not rest.startswith("/") else folder.resolve().name
    base = card.get("base_model")
    return f"{called}, made from {base}" if isinstance(base, str) else called


def _hub_name(folder: Path) -> str | None:
    """Return the hub name of a model in the hub's own cache (`models--ORG--NAME/snapshots/REVISION`), or None."""
    home = folder.resolve().parent
    kind, _, name = home.parent.name.partition("--")
    return name.replace("--", "/", 1) if home.name == "snapshots" and kind == "models" and name else None


def _front_matter(folder: Path) -> dict[str, Any]:
    """Return the metadata of a model's own card, or {} if the model has no readable card."""
    path = folder / CARD
    try:
        before, start, rest = path.read_text(encoding="utf-8").partition("---\n")
        front, end, _ = rest.partition("\n---")
        values = parse_yaml(front, str(path)) if not before.strip() and start and end else None
    except (OSError, ValueError, UpcycleError):
        return {}
    return values if isinstance(values, dict) else {}
