"""Parts shared by the commands: options of the spec, dtypes of weights, and the output of answers."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import SpecError, UpcycleError
from nemo_upcycle.init.methods import METHODS
from nemo_upcycle.spec import (
    MOE_LAYERS,
    OUTPUT_SCALES,
    ROUTER_INITS,
    ROUTER_ORDERS,
    ROUTER_SCORES,
    UpcycleSpec,
)
from nemo_upcycle.utils.dtypes import DTYPES, dtype_of


_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
#: An option: type, placeholder and help text.
OptionRow = tuple[Callable[[str], Any], str, str]
#: field of the spec -> its option
_SPEC_FIELDS: dict[str, OptionRow] = {
    "num_experts": (int, "N", "routed experts of an MoE layer"),
    "top_k": (int, "K", "experts that process each token"),
    "granularity": (int, "G", "number of parts of the dense network; N and K are multiples of G"),
    "method": (str, "|".join(METHODS), "; ".join(method.summary for method in METHODS.values())),
    "noise_std": (float, "X", "standard deviation of the noise, relative to the weights"),
    "drop_ratio": (float, "R", "share of the neurons that the method drop redraws"),
    "shared_experts": (int, "S", "experts that process every token, at most G"),
    "moe_layers": (str, "WHICH", "; ".join((*MOE_LAYERS[:3], "or numbers: 0,2,4"))),
    "expert_utility": (
        str,
        "FILE",
        "YAML file with a number for each expert of the parent; a higher number gives more copies",
    ),
    "router_init": (
        str,
        "|".join(ROUTER_INITS),
        "distribution of the router's weights; prompts: computed from prompts",
    ),
    "router_std": (
        float,
        "X",
        "standard deviation of the router's weights, or of the noise added to a parent's router",
    ),
    "router_spread": (float, "X", "with prompts: standard deviation of a token's logits over the copies"),
    "router_prompts": (str, "FILE", "with prompts: YAML file with a list of the texts of each copy"),
    "calibration": (str, "FILE", "with prompts: file written by nemo-upcycle calibrate"),
    "router_order": (str, "|".join(ROUTER_ORDERS), "softmax after or before top-k"),
    "router_score": (str, "|".join(ROUTER_SCORES), "function applied to the router's logits"),
    "routed_scaling_factor": (float, "X", "factor applied to the weights of the chosen experts"),
    "output_scale": (str, "|".join(OUTPUT_SCALES), "exact: copies compute the parent's function"),
    "seed": (int, "N", "seed of all random numbers"),
}


def add_options(group: argparse._ArgumentGroup, fields: Mapping[str, OptionRow], default: Any = None) -> None:
    """Add an option for each field, for example --top-k for `top_k` and --experts for `num_experts`.

    Args:
        group: group of the options in the help.
        fields: name of a field -> its option.
        default: value of an omitted option.
    """
    for field, (kind, placeholder, text) in fields.items():
        option = "--" + field.removeprefix("num_").replace("_", "-")
        group.add_argument(option, dest=field, type=kind, metavar=placeholder, default=default, help=text)


def add_spec_options(parser: argparse.ArgumentParser, title: str = "the MoE", defaults: bool = True) -> None:
    """Add the options for the fields of an `UpcycleSpec`; if `defaults` is set, the help shows the default values."""
    fields = _SPEC_FIELDS
    if defaults:
        own = UpcycleSpec.__dataclass_fields__
        fields = {
            name: (kind, placeholder, f"{text} (default: {own[name].default})")
            for name, (kind, placeholder, text) in fields.items()
        }
    add_options(parser.add_argument_group(title), fields, argparse.SUPPRESS)


def given_spec(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of the spec that the command line sets."""
    return {field: getattr(args, field) for field in _SPEC_FIELDS if hasattr(args, field)}


def used_spec(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of the spec that the command line sets, and check that each has an effect.

    Raises:
        SpecError: the method or the router would ignore a field.
    """
    given = given_spec(args)
    method, router = (given.get(name, getattr(UpcycleSpec, name)) for name in ("method", "router_init"))
    uses = {one.strength: ("method", name) for name, one in METHODS.items() if one.strength and name != method}
    if router in ROUTER_INITS and not ROUTER_INITS[router].from_data:
        uses |= dict.fromkeys(("router_spread", "router_prompts"), ("router_init", "prompts"))
    elif router in ROUTER_INITS:
        uses["router_std"] = ("router_init", "normal")
    if router == "zero":
        uses["router_std"] = ("router_init", "normal")
    for field, (name, value) in uses.items():
        if field in given and method in METHODS:
            raise SpecError(
                field=field,
                kind="refused",
                got=f"is ignored unless <{name}> is {value}",
                fix=f"add <{name}>={value}, or omit <{field}>",
            )
    return given


def add_dtype(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add the option --dtype for the weights; without a default, the weights keep the dtype of the source."""
    text = f"type of the weights on disk (default: {default or 'the type of the source'})"
    parser.add_argument("--dtype", type=dtype_of, default=default, metavar="|".join(DTYPES), help=text)


def add_no_proof(parser: argparse.ArgumentParser) -> None:
    """Add the option --no-proof."""
    text = "do not run the written model in transformers"
    parser.add_argument("--no-proof", action="store_true", help=text)


def require_overrides(args: argparse.Namespace) -> None:
    """Report a usage error if an override is not KEY=VALUE."""
    for word in args.overrides:
        if "=" not in word:
            args.parser.error(f"argument {word!r} is not KEY=VALUE")


def folder_to_make(text: str) -> Path:
    """Return the path of an output folder from its argument; `main` refuses an empty name."""
    return Path(text).expanduser()


def file_size(text: str) -> int:
    """Parse a file size in the notation of transformers, and return it in bytes.

    Raises:
        UpcycleError: the text is not a size.

    Example:
        >>> file_size("5GB"), file_size("1.5 GiB")
        (5000000000, 1610612736)
    """
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)\s*([KMGT]i?B)", text.strip(), re.IGNORECASE)
    size_bytes = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if not size_bytes:
        raise UpcycleError(
            "size of a file",
            got=repr(text),
            expected="a number above 0 and a unit: KB, MB, GB, TB, KiB, MiB, GiB or TiB",
            fix="write e.g. 5GB",
        )
    return size_bytes


def show(args: argparse.Namespace, answer: dict[str, Any], text: str) -> None:
    """Write a command's answer to stdout, as text or as JSON.

    A reader that stops early (`| head`) is not an error.

    Raises:
        UpcycleError: the answer cannot be written, and the command has no other result.
    """
    as_json = json.dumps(answer, indent=2, default=str, allow_nan=False)
    try:
        sys.stdout.write((as_json if args.json else text.rstrip()) + "\n")
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # because Python writes the buffer at exit
        if error.errno == errno.EPIPE:
            return
        done = f"; {args.output} itself is complete" if "output" in args else ""
        fix = f"redirect standard output to another file{done}"
        problem = UpcycleError("Standard output", kind="state", got=f"cannot be written: {error.strerror}", fix=fix)
        if not done:
            raise problem from None
        sys.stderr.write(f"error: {problem}\n")
