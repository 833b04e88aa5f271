"""`nemo-upcycle calibrate`: run a dense model over a sample of text, for routers from data and splits."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_upcycle.cli.common import add_spec_options, given_spec, show
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.files import size_text
from nemo_upcycle.utils.validation import check_whole


if TYPE_CHECKING:
    from nemo_upcycle.calibration.collect import CalibrationReport

EPILOG = """examples:
  nemo-upcycle calibrate models/Llama-3-8B kmeans.safetensors --data runs/data --experts 8 --router-init kmeans
  nemo-upcycle calibrate models/Llama-3-8B split.safetensors --data runs/data --experts 64 --top-k 8 --granularity 8 \\
      --expert-split coactivation --router-init kmeans
  nemo-upcycle calibrate models/base prompts.safetensors --experts 4 --router-init prompts --router-prompts texts.yaml

Give convert and the training the same settings and --calibration FILE. Run it again to continue a stopped calibration.
exit status: 0 done; 2 a value or a file is wrong."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    text = "dense Hugging Face folder, hf://ORG/NAME on the hub (downloaded), or asset://smollm2-135m"
    parser.add_argument("source", metavar="SRC", help=text)
    parser.add_argument("output", metavar="FILE", type=Path, help="file to write")
    parser.add_argument("--data", metavar="DIR", type=Path, help="finished folder of nemo-upcycle data, for its text")
    parser.add_argument("--tokens", metavar="N", type=int, default=16384, help="tokens of text (default: 16384)")
    add_spec_options(parser)


def run(args: argparse.Namespace) -> int:
    """Calibrate, show the result, and return the exit status.

    Raises:
        UpcycleError: a value or a file is wrong.
    """
    spec = UpcycleSpec(**given_spec(args))
    check_whole("tokens", args.tokens, 1)
    from nemo_upcycle.calibration.collect import calibrate, require_use
    from nemo_upcycle.data.calibration_sample import calibration_sample
    from nemo_upcycle.data.dense import local_model
    from nemo_upcycle.sources import open_dense

    require_use(spec)
    source = local_model(args.source)
    with open_dense(source) as dense:
        sample = calibration_sample(spec, Path(dense.path), args.data, args.tokens)
        done = calibrate(dense, args.output.expanduser(), spec, sample)
    show(args, asdict(done), _text(done))
    return 0


def _text(done: CalibrationReport) -> str:
    how = f"made in {done.seconds:.3g} s" if done.made else "made before, from the same inputs"
    lines = [
        f"{done.path}: {done.layers} layers, {done.tokens} tokens, {size_text(done.size_bytes)}, {how}",
        f"sha256 {done.sha256}",
    ]
    if done.within:
        by_data, consecutive = (statistics.fmean(shares) for shares in zip(*done.within.values(), strict=True))
        lines.append(
            f"co-activated pairs in one part: {100 * by_data:.3g} %, in consecutive parts {100 * consecutive:.3g} %"
        )
    return "\n".join(lines)
