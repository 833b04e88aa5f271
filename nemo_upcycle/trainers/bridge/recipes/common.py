"""Let a Bridge configuration start from a dense checkpoint, upcycled or as it is."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.bridge.recipes.common import _pretrain_common
from megatron.bridge.recipes.utils.environment_utils import COMMON_RECIPE_ENV_VARS
from megatron.bridge.training.config import ConfigContainer
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

from nemo_upcycle.data.finished import open_blend
from nemo_upcycle.errors import SpecError
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers import paper
from nemo_upcycle.trainers.bridge.blend import BlendDataset
from nemo_upcycle.trainers.bridge.changes import changed_settings
from nemo_upcycle.trainers.bridge.hooks import refuse_first_step
from nemo_upcycle.trainers.bridge.model_changes import copied, follow, forget_experts, model_like
from nemo_upcycle.trainers.bridge.models import Origin, made_of
from nemo_upcycle.trainers.bridge.node import Upcycling, UpcyclingConfig, architecture_at
from nemo_upcycle.utils.progress import show_messages
from nemo_upcycle.utils.validation import check_named, check_whole


#: Where `upcycled` takes rates, schedule, steps and batch size from: the paper, or the configuration itself.
RATES = ("paper", "keep")


def with_upcycling(config: ConfigContainer, hf_model_path: str | Path, **node: Any) -> UpcyclingConfig:
    """Let a Bridge training start from a dense checkpoint that a spec upcycles.

    The node `upcycling` of the result holds the parent and the spec. Bridge's overrides change the node
    (`upcycling.top_k=4`), and the model follows. Layout, precision, kernels, rates, schedule, data and folders do
    not change. Change the result as you would change Bridge's own configuration.

    Args:
        config: Bridge's recipe, or a configuration of your own; it stays unchanged, and the result shares its parts.
        hf_model_path: dense checkpoint: a folder that every rank sees, ORG/NAME, hf://ORG/NAME, or an asset.
        node: other fields of the node: any field of `UpcycleSpec`, `branches`, `non_expert_weights`.

    Raises:
        SpecError: a field of the node is unknown or invalid, or Bridge's model class cannot represent the model.
        UpcycleError: the dense checkpoint does not exist.

    Example:
        >>> config = with_upcycling(config, "/models/Llama-3-8B", num_experts=8, top_k=2)  # doctest: +SKIP
        >>> config.model.expert_model_parallel_size = 8  # doctest: +SKIP
        >>> pretrain(config, forward_step)  # doctest: +SKIP
    """
    known = [name for name in Upcycling.__dataclass_fields__ if name != "hf_model_path"]
    if unknown := [name for name in node if name not in known]:
        raise SpecError.unknown("field of the node upcycling", unknown[0], known)
    return _start_from(config, str(hf_model_path), node)


def with_parent(config: ConfigContainer, hf_model_path: str | Path) -> UpcyclingConfig:
    """Let a Bridge training start from a dense checkpoint as it is: the baseline, without the node `upcycling`.

    Args:
        config: Bridge's recipe, an upcycled training, or a configuration of your own; it stays unchanged.
        hf_model_path: see `with_upcycling`.

    Raises:
        UpcycleError: the dense checkpoint does not exist.
    """
    return _start_from(config, str(hf_model_path), None)


def _start_from(
    given: ConfigContainer, hf_model_path: str, node: dict[str, Any] | None, **settings: Any
) -> UpcyclingConfig:
    """Return a configuration with a parent and a node, and the model that follows from both.

    Args:
        given: configuration to start from. If this package made its model, only the model's parent and spec change.
        hf_model_path: dense checkpoint.
        node: fields of the node; None: the parent is trained as it is.
        settings: settings of the model, which take precedence over the model's present settings.
    """
    check_named("hf_model_path", hf_model_path)
    config = UpcyclingConfig.of(given)
    config.upcycling = None if node is None else Upcycling(hf_model_path=hf_model_path, **node)
    config.hf_model_path = hf_model_path if node is None else None
    origin, before = Origin(architecture_at(hf_model_path), config.spec), given.model and made_of(given.model)
    if before is None:
        settings = {"seq_length": config.dataset.seq_length} | settings
        config.model = model_like(given.model, origin, **settings)
        refuse_first_step(config.model, hf_model_path)
    else:
        config.model = copied(given.model)
        follow(config.model, origin)
        if before.arch.num_experts and not origin.arch.num_experts:
            forget_experts(config.model)
            if config.comm_overlap is not None:
                config.comm_overlap = copy.copy(config.comm_overlap)
                config.comm_overlap.overlap_moe_expert_parallel_comm = False
    config.tokenizer, config.checkpoint = copy.copy(config.tokenizer), copy.copy(config.checkpoint)
    config.tokenizer.use_tokenizer_vocab_size = False  # use the parent's vocabulary size
    if config.tokenizer.tokenizer_type == "NullTokenizer" and before is None:
        config.tokenizer.vocab_size = config.model.vocab_size - 1
    config.checkpoint.dist_ckpt_optim_fully_reshardable = True  # so that optimizer states fit other layouts
    return config


def upcycled_pretraining(
    dense: str, spec: UpcycleSpec | None, *, seq_length: int, data: str | Path | None = None, **settings: Any
) -> UpcyclingConfig:
    """Make Bridge's pretraining of an upcycled model, or of its parent, with the paper's numbers.

    Bridge's own numbers are for a training from random weights; see `trainers.paper`. Without `data` the run trains on
    Bridge's mock data, and says so at its start.

    Args:
        dense: dense checkpoint; see `with_upcycling`.
        spec: how to upcycle the checkpoint; None trains the dense model as it is.
        seq_length: sequence length S (tokens).
        data: see `upcycled`.
        settings: further settings of the model: layout and kernels.

    Example:
        >>> upcycled_pretraining("/models/mine", UpcycleSpec(), seq_length=8192, data="/data/mine")  # doctest: +SKIP
    """
    check_whole("seq_length", seq_length, 1)
    config = _pretrain_common()
    config.dataset.seq_length, config.train.micro_batch_size = seq_length, 1
    config.env_vars = dict(COMMON_RECIPE_ENV_VARS)
    return upcycled(config, dense, spec, data, seq_length=seq_length, **settings)


def upcycled(
    config: ConfigContainer,
    dense: str | Path,
    spec: UpcycleSpec | None,
    data: str | Path | None = None,
    *,
    rates: str = "paper",
    seq_length: int | None = None,
    **settings: Any,
) -> UpcyclingConfig:
    """Turn any Bridge pretraining into a training that starts from a dense checkpoint, with the paper's numbers.

    The result is the same as from `with_upcycling` (`with_parent` if there is no spec), plus the paper's rates,
    schedule, steps and batch size. Every changed setting is printed as an override for Bridge's command line.

    Args:
        config: Bridge's recipe, or a configuration of your own; it stays unchanged.
        dense: dense checkpoint; see `with_upcycling`.
        spec: how to upcycle the checkpoint; with None, the run is the dense baseline.
        data: a finished folder of `nemo-upcycle data`; None keeps the configuration's data.
        rates: `paper`, or `keep` for the configuration's own rates, schedule, steps and batch size.
        seq_length: sequence length S (tokens); None: the sequence length of the configuration's data.
        settings: further settings of the model, which take precedence over the configuration's settings.

    Raises:
        SpecError: Bridge's model class cannot represent the model, or `rates` is unknown.
        UpcycleError: the dense checkpoint does not exist, or the data are not finished.

    Example:
        >>> config = upcycled(my_config(), "/models/mine", UpcycleSpec(), "/data/mine")  # doctest: +SKIP
        >>> pretrain(config, forward_step, callbacks=upcycle_callbacks(config, "/runs/mine"))  # doctest: +SKIP
    """
    if rates not in RATES:
        raise SpecError.unknown("rates", rates, RATES)
    given, seq_length = config, seq_length or config.dataset.seq_length
    node = None if spec is None else asdict(spec)
    config = _start_from(given, str(dense), node, seq_length=seq_length, **settings)
    if data:
        config.dataset = BlendDataset(folder=str(open_blend(Path(data)).folder), seq_length=seq_length)
    is_text = not isinstance(config.dataset, BlendDataset | GPTDatasetConfig)
    values = {
        "tokenizer.tokenizer_type": "HuggingFaceTokenizer" if is_text else "NullTokenizer",
        "tokenizer.tokenizer_model": None,  # on texts, the run then uses the parent's tokenizer
        "tokenizer.vocab_size": None if is_text else config.model.vocab_size - 1,
        "dataset.seq_length": seq_length,
        "checkpoint.load": config.checkpoint.save,
        "dist.distributed_timeout_minutes": 60,  # only the first rank computes the order of the samples
    }
    if rates == "paper":
        values |= {
            "train.train_iters": paper.STEPS,
            "train.global_batch_size": max(1, paper.TOKENS_A_STEP // seq_length),
            "validation.eval_interval": 2000,
            "checkpoint.save_interval": paper.CHECKPOINT_STEPS,
            "checkpoint.most_recent_k": 2,  # Bridge keeps all checkpoints by default
            "upcycle.keep_every": paper.KEEP_EVERY,
            "optimizer.lr": paper.PEAK,
            "optimizer.min_lr": paper.END,
            "optimizer.adam_eps": 1e-5,  # NeMo's value
            "scheduler.lr_decay_style": "cosine",
            "scheduler.lr_decay_iters": None,
            "scheduler.lr_warmup_iters": paper.WARMUP_STEPS,
            "scheduler.lr_warmup_fraction": None,
            # Bridge's scheduler has a weight decay of 0.033, which would replace the optimizer's 0.1.
            "scheduler.start_weight_decay": config.optimizer.weight_decay,
            "scheduler.end_weight_decay": config.optimizer.weight_decay,
        }
    for name, value in values.items():
        part, _, field = name.partition(".")
        if getattr(owner := getattr(config, part), field) != value:
            setattr(config, part, owner := copy.copy(owner))
            setattr(owner, field, value)
    if given.model:
        show_messages().info("Changed settings, as overrides:")
        for line in changed_settings(UpcyclingConfig.of(given), config):
            show_messages().info("  %s", line)
    return config
