"""`nemo-upcycle calibrate`: run a dense model over the prompts of each copy, to initialise a router from prompts."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from nemo_upcycle.cli.common import add_spec_options, show, used_spec
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.files import size_text


EPILOG = """examples:
  nemo-upcycle calibrate asset://smollm2-135m prompts.safetensors --experts 4 --router-init prompts \
--router-prompts examples/prompts.yaml
  nemo-upcycle calibrate models/base prompts.safetensors --experts 4 --router-init prompts --router-prompts texts.yaml

Give the same settings and --calibration FILE to convert and to the training.
exit status: 0 done; 2 wrong value or file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    text = "dense Hugging Face folder, hf://ORG/NAME on the hub (downloaded), or asset://smollm2-135m"
    parser.add_argument("source", metavar="SRC", help=text)
    parser.add_argument("output", metavar="FILE", type=Path, help="file to write")
    add_spec_options(parser)


def run(args: argparse.Namespace) -> int:
    """Calibrate, show the result, and return the exit status.

    Raises:
        UpcycleError: a value or a file is wrong.
    """
    spec = UpcycleSpec(**used_spec(args))
    from nemo_upcycle.data.calibration_sample import calibration_sample
    from nemo_upcycle.online.calibration import calibrate, require_use
    from nemo_upcycle.sources.fetch import local_model
    from nemo_upcycle.sources.resolve import open_dense

    require_use(spec)
    with open_dense(local_model(args.source)) as dense:
        done = calibrate(dense, args.output.expanduser(), spec, calibration_sample(spec, Path(dense.path)))
    how = f"made in {done.seconds:.3g} s" if done.made else "made before, from the same inputs"
    text = f"{done.path}: {done.layers} layers, {done.tokens} tokens, {size_text(done.size_bytes)}, {how}"
    show(args, asdict(done), f"{text}\nsha256 {done.sha256}")
    return 0
