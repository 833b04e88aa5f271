"""Apply examples/bridge_contribution to Megatron-Bridge's source, and run its linter, mypy and the new tests there.

    python -m benchmarks.bridge_contribution FOLDER --python .venv-bridge-sample/bin/python

FOLDER is a clone of NVIDIA-NeMo/Megatron-Bridge: what is applied stays there, for `git commit --signoff -m
"feat(model): add Mixtral and Qwen2 MoE bridges"`, and as much for upcycling ("feat(training)"). Of a git directory
without a working tree, HEAD is written to a temporary folder. The files lie as in Bridge's tree; `EDITS` are the lines
that they need in files of Bridge's. The tests run with `--python`, which needs Bridge's dependencies, this package and
pytest, no GPU: a stand-in of Transformer Engine does.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path


ROOT = Path(__file__).parents[1]
CONTRIBUTION = ROOT / "examples/bridge_contribution"
_MODELS, _PAGES = "src/megatron/bridge/models", "docs/models"
_LAUNCHERS = [
    f"tests/functional_tests/launch_scripts/{gpu}/active/L1_Launch_models_qwen2.sh" for gpu in ("h100", "gb200")
]
_TRAINING = "src/megatron/bridge/training"
_SETUP_TESTS = ("test_setup", "test_modelopt_setup", "test_setup_restart_hooks")
_QWEN_TESTS = "  tests/functional_tests/test_groups/models/qwen"
_PEFT_NEEDS = 'pretrained_checkpoint is not None, "PEFT requires a pretrained checkpoint path"\n'
#: File of Bridge's, text that stands there once, and what is put in its place.
EDITS = [
    (
        f"{_MODELS}/qwen/__init__.py",
        "import Qwen2Bridge  # noqa: F401\n",
        "import Qwen2Bridge  # noqa: F401\n"
        "from megatron.bridge.models.qwen.qwen2_moe_bridge import Qwen2MoEBridge  # noqa: F401\n",
    ),
    (
        f"{_MODELS}/__init__.py",
        "from megatron.bridge.models.nemotron import (\n",
        "from megatron.bridge.models.mixtral import (\n    MixtralBridge,\n)\n"
        "from megatron.bridge.models.nemotron import (\n",
    ),
    (f"{_MODELS}/__init__.py", '    "MistralModelProvider",\n', '    "MistralModelProvider",\n    "MixtralBridge",\n'),
    *(
        (
            launcher,
            f"{_QWEN_TESTS}/test_qwen2_conversion.py\n",
            f"{_QWEN_TESTS}/test_qwen2_conversion.py \\\n{_QWEN_TESTS}/test_qwen2_moe_conversion.py\n",
        )
        for launcher in _LAUNCHERS
    ),
    (f"{_PAGES}/mistral/index.md", "mistral.md\nministral3.md\n", "mistral.md\nministral3.md\nmixtral.md\n"),
    (
        f"{_PAGES}/mistral/index.md",
        "| Ministral 3 | [ministral3.md](ministral3.md) |\n",
        "| Ministral 3 | [ministral3.md](ministral3.md) |\n| Mixtral | [mixtral.md](mixtral.md) |\n",
    ),
    (f"{_PAGES}/qwen/index.md", "qwen.md\nqwen3-moe.md\n", "qwen.md\nqwen2-moe.md\nqwen3-moe.md\n"),
    (
        f"{_PAGES}/qwen/index.md",
        "| Qwen3-MoE | [qwen3-moe.md](qwen3-moe.md) |\n",
        "| Qwen2-MoE | [qwen2-moe.md](qwen2-moe.md) |\n| Qwen3-MoE | [qwen3-moe.md](qwen3-moe.md) |\n",
    ),
    (
        f"{_PAGES}/README.md",
        "[Ministral 3](mistral/ministral3.md) |",
        "[Ministral 3](mistral/ministral3.md), [Mixtral](mistral/mixtral.md) |",
    ),
    (f"{_PAGES}/README.md", "[Qwen](qwen/qwen.md), ", "[Qwen](qwen/qwen.md), [Qwen2-MoE](qwen/qwen2-moe.md), "),
    (
        f"{_PAGES}/README.md",
        "MiniMax, Nemotron-3, OLMoE, Qwen3-MoE",
        "MiniMax, Mixtral, Nemotron-3, OLMoE, Qwen2-MoE, Qwen3-MoE",
    ),
    (
        f"{_PAGES}/mistral/mistral.md",
        "Additional Mistral models (including MoE variants like Mixtral) may be supported",
        "[Mixtral](mixtral.md) has a bridge of its own. Additional Mistral models may be supported",
    ),
    ("README.md", "Ministral 3 (3B/8B/14B) |", "Ministral 3 (3B/8B/14B), Mixtral (8x7B/8x22B) |"),
    ("README.md", "| Qwen2 / Qwen2.5, Qwen3, ", "| Qwen2 / Qwen2.5, Qwen2-MoE, Qwen3, "),
    (
        "docs/training/moe-optimization.md",
        "| Upcycling | Convert dense checkpoint to MoE without retraining |\n",
        "| [Upcycling](upcycling.md) | Start the experts of an MoE run from a dense checkpoint |\n",
    ),
    ("docs/index.md", "training/moe-optimization.md\n", "training/moe-optimization.md\ntraining/upcycling.md\n"),
    (
        "docs/training/README.md",
        "| **[Checkpointing](checkpointing.md)** | Checkpoint saving,",
        "| **[Upcycling](upcycling.md)** | MoE models from dense checkpoints | Starting from a dense model |\n"
        "| **[Checkpointing](checkpointing.md)** | Checkpoint saving,",
    ),
    (
        "docs/skills-index.md",
        "skills/nemo-mbridge-mlm-bridge-training/SKILL\n",
        "skills/nemo-mbridge-mlm-bridge-training/SKILL\nskills/nemo-mbridge-moe-upcycling/SKILL\n",
    ),
    *(
        (
            f"tests/unit_tests/training/{name}.py",
            "        tensor_inspect=SimpleNamespace(),\n",
            "        tensor_inspect=SimpleNamespace(),\n        upcycling=None,\n",
        )
        for name in _SETUP_TESTS
    ),
    (
        f"{_TRAINING}/config.py",
        "from megatron.bridge.training.tokenizers.config import TokenizerConfig\n",
        "from megatron.bridge.training.tokenizers.config import TokenizerConfig\n"
        "from megatron.bridge.training.upcycling import UpcyclingConfig\n",
    ),
    (
        f"{_TRAINING}/config.py",
        "    peft: Optional[PEFT] = None\n",
        "    peft: Optional[PEFT] = None\n    upcycling: UpcyclingConfig | None = None\n",
    ),
    (
        f"{_TRAINING}/config.py",
        _PEFT_NEEDS,
        f"{_PEFT_NEEDS}"
        "\n"
        "        if self.upcycling is not None and (self.peft or self.checkpoint.pretrained_checkpoint):\n"
        "            raise ValueError(\n"
        '                "upcycling initializes the model from upcycling.hf_model_path: it cannot be combined with "\n'
        '                "peft or checkpoint.pretrained_checkpoint"\n'
        "            )\n",
    ),
    (
        f"{_TRAINING}/config.py",
        "        cfg.mixed_precision.setup(cfg.model, cfg.optimizer, cfg.ddp)\n",
        "        cfg.mixed_precision.setup(cfg.model, cfg.optimizer, cfg.ddp)\n"
        "\n"
        "    # Give a dense model its experts\n"
        "    if cfg.upcycling is not None:\n"
        "        cfg.upcycling.setup(cfg.model)\n",
    ),
    (
        f"{_TRAINING}/setup.py",
        "from megatron.bridge.training.utils.checkpoint_utils import checkpoint_exists, is_hf_checkpoint_dir\n",
        "from megatron.bridge.training.upcycling import create_upcycling_pre_wrap_hook\n"
        "from megatron.bridge.training.utils.checkpoint_utils import checkpoint_exists, is_hf_checkpoint_dir\n",
    ),
    (
        f"{_TRAINING}/setup.py",
        '        print_rank_0("Registered PEFT pre-wrap hook")\n',
        '        print_rank_0("Registered PEFT pre-wrap hook")\n'
        "\n"
        "    # Register the hook that fills a new model from a dense checkpoint\n"
        "    if cfg.upcycling is not None:\n"
        "        upcycling_hook = create_upcycling_pre_wrap_hook(\n"
        "            cfg.upcycling, cfg.checkpoint, partial(_should_load_checkpoint, cfg, checkpoint_manager)\n"
        "        )\n"
        '        _register_setup_pre_wrap_hook(cfg.model, upcycling_hook, setup_hook_name="upcycling")\n',
    ),
]
#: Where files of the contribution lie.
_PARTS = ("docs", "examples", "skills", "src", "tests")
#: Bridge's own tests of what every model has to keep to, and of the setup that upcycling is a part of.
_RULES = [
    "models/test_models_imports",
    "models/test_no_size_specific_provider_classes",
    "models/test_autobridge_registration_matrix",
    *(f"training/{name}" for name in _SETUP_TESTS),
]
_CARDS = "skills/create-model-verification-card"
#: Of Bridge's imports only the errors of the given files are told; Megatron-Core has no types.
_MYPY = ["--strict", "--follow-imports=silent", "--ignore-missing-imports", "--explicit-package-bases"]


def apply(bridge: Path) -> list[str]:
    """Copy the files and make the edits; where they are made already, nothing changes.

    Args:
        bridge: working tree of Megatron-Bridge.

    Returns:
        The paths of all files that are new or changed, in Bridge's tree.

    Raises:
        SystemExit: a file or a line that an edit is put beside is not there; nothing is written then.

    Example:
        >>> apply(Path("Megatron-Bridge"))[0]  # doctest: +SKIP
        'docs/models/mistral/mixtral.md'
    """
    texts: dict[Path, str] = {}
    for name, old, new in EDITS:
        path = bridge / name
        if not path.is_file():
            raise SystemExit(f"{path} is not there: is {bridge} a clone of Megatron-Bridge's main?")
        text = texts.setdefault(path, path.read_text(encoding="utf-8"))
        if new not in text:
            if text.count(old) != 1:
                raise SystemExit(f"{name}: got {text.count(old)} times {old!r}, expected once. Fix: adapt EDITS")
            texts[path] = text.replace(old, new)
    paths = [path for part in _PARTS for path in sorted(CONTRIBUTION.glob(f"{part}/**/*.*"))]
    names = [str(path.relative_to(CONTRIBUTION)) for path in paths if path.suffix in (".md", ".py", ".sh", ".yaml")]
    for name in names:
        (bridge / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CONTRIBUTION / name, bridge / name)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    return names + [str(path.relative_to(bridge)) for path in texts]


def check(bridge: Path, names: list[str], python: str) -> bool:
    """Run Bridge's linter on the files and the unit tests, and say what passed and what cannot run here.

    Args:
        bridge: working tree that `apply` changed.
        names: the files, as `apply` returns them.
        python: interpreter for the tests; ruff is this one's.

    Returns:
        Whether all that could run passed.
    """
    modules = [name for name in names if name.endswith(".py")]
    tests = [name for name in modules if Path(name).name.startswith("test_")]
    units = [name for name in tests if name.startswith("tests/unit_tests/")]
    functional = [name for name in tests if name.startswith("tests/functional_tests/")]
    of_models = [name for name in functional if "/models/" in name]  # pretrain needs the Megatron-Core that main pins
    rules = [f"tests/unit_tests/{name}.py" for name in _RULES]
    sources = [name for name in modules if name.startswith("src/") and (CONTRIBUTION / name).is_file()]
    formatted = [name for name in modules if name != f"{_TRAINING}/setup.py"]  # main's is not formatted either
    cards = [name for name in names if name.startswith("examples/model_verification_cards/")]
    ruff = [sys.executable, "-m", "ruff"]
    mypy = [sys.executable, "-m", "mypy", *_MYPY, "--python-executable", python]
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "--disable-warnings", "--durations-min=600"]
    on_cpu = [*pytest, "tests/bridge/test_conversion.py", "tests/bridge/test_contribution.py", "-k", "contribution"]
    passed = [
        _passes("ruff check", bridge, [*ruff, "check", *modules]),
        _passes("ruff check --select I", bridge, [*ruff, "check", "--select", "I", *modules]),
        _passes("ruff format", bridge, [*ruff, "format", "--check", *formatted]),
        _passes("mypy --strict", bridge, [*mypy, *sources]),
        _passes("model verification card", bridge, [python, f"{_CARDS}/scripts/validate_card.py", *cards]),
        _passes("unit tests", bridge, [*pytest, *units]),
        _passes("tests of Bridge's rules", bridge, [*pytest, *rules]),
        _passes("functional tests of models, collected", bridge, [*pytest, "--collect-only", *of_models]),
        _passes(
            "small models there and back, and upcycled, on a CPU by this package's test", bridge, on_cpu, folder=ROOT
        ),
    ]
    print("not run: the functional tests, for which Bridge wants two GPUs and Transformer Engine:")
    print(f"  uv run python -m pytest {' '.join(functional)}")
    return all(passed)


def _passes(title: str, bridge: Path, command: list[str], folder: Path | None = None) -> bool:
    paths = os.pathsep.join(filter(None, [str(bridge / "src"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths, "MYPYPATH": str(bridge / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=folder or bridge, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or [""]
    print(f"{'FAILED' if done.returncode else 'passed'}: {title}: {lines[-1].strip('= ')}", flush=True)
    if done.returncode:
        print(*lines[-40:], done.stderr.strip(), sep="\n")
    return not done.returncode


def _archived(repository: Path, folder: Path) -> Path:
    """Write what is needed of HEAD of a git directory: a partial mirror may lack large files elsewhere."""
    names = ["src", "tests", _PAGES, "docs/training", "docs/index.md", "docs/skills-index.md", _CARDS]
    names += ["README.md", "pyproject.toml", "ruff.toml"]
    archive = subprocess.run(["git", "-C", repository, "archive", "HEAD", *names], capture_output=True, check=False)
    if archive.returncode:
        raise SystemExit(f"git archive of {repository} failed: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


def main() -> None:
    """Apply and check; status 1 where something fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="clone of Megatron-Bridge, or its git directory")
    parser.add_argument("--python", default=sys.executable, help="interpreter for the tests; default: this one")
    options = parser.parse_args()
    python = shutil.which(options.python)
    if python is None:
        parser.error(f"--python {options.python} is no program")
    with tempfile.TemporaryDirectory() as folder:
        has_tree = (options.folder / "src/megatron/bridge").is_dir()
        bridge = options.folder if has_tree else _archived(options.folder, Path(folder))
        names = apply(bridge.absolute())
        print(f"applied: {len(names)} files to {bridge}")
        passed = check(bridge.absolute(), names, os.path.abspath(python))
    raise SystemExit(not passed)


if __name__ == "__main__":
    main()
