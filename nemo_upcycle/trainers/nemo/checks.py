"""Check a NeMo recipe before anything is written, fetched or launched."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import nemo_run as run
from torch.nn.parallel import DistributedDataParallel

from nemo_upcycle.data.blend import DEMO, no_data
from nemo_upcycle.data.chat.finished import FinishedChat, open_chat
from nemo_upcycle.data.finished import FinishedBlend, open_blend
from nemo_upcycle.errors import SpecError, UpcycleError, did_you_mean
from nemo_upcycle.init.calibration_file import calibration_of
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.config_fields import check_fields
from nemo_upcycle.models.layer_settings import DECODER
from nemo_upcycle.models.megatron_config import FIELDS, SIZES, architecture_of, check_spec, require_buildable
from nemo_upcycle.planning.hardware import known_parent
from nemo_upcycle.planning.layout import CPU_RANKS
from nemo_upcycle.sources.fetch import read_parent
from nemo_upcycle.sources.find import Parent
from nemo_upcycle.trainers.commands import fp8_precision
from nemo_upcycle.trainers.layout import check_layout
from nemo_upcycle.trainers.nemo.recipes import recipe_spec
from nemo_upcycle.trainers.settings import check_masters, check_packs, check_values, setting
from nemo_upcycle.utils.validation import is_whole


#: Sizes of the experts, compared only if the model has experts.
_EXPERTS = ("num_experts", "top_k", "expert_ffn_size", "shared_ffn_size", "shared_gate", "moe_pattern")


def ranks_of(recipe: run.Partial, where: str = "") -> tuple[int, int]:
    """Return the number of nodes and of ranks per node that a recipe's trainer asks for.

    Args:
        recipe: recipe of a training job.
        where: prefix of the recipe's overrides, for error messages.

    Raises:
        SpecError: a number is missing or invalid.
    """
    return _whole(recipe, "num_nodes", 1, where), _whole(recipe, "devices", None, where)


def is_for_gpus(recipe: run.Partial) -> bool:
    """Return whether a recipe needs GPUs: it names them as accelerator, or has more ranks than a CPU run can have."""
    nodes, per_node = ranks_of(recipe)
    return getattr(recipe.trainer, "accelerator", None) in ("gpu", "cuda") or nodes * per_node > CPU_RANKS


def check_own_data(recipe: run.Partial) -> None:
    """Refuse a recipe that would train on the demo texts on GPUs, because no chain has set other data.

    Raises:
        UpcycleError: the recipe names no data and would train on the demo texts.
    """
    from nemo_upcycle.data.blend_module import blend_data

    data = recipe.data
    is_demo = data.__fn_or_cls__ is blend_data and data.folder is None and data.blend == DEMO
    if is_demo and is_for_gpus(recipe):
        raise no_data("the recipe trains on GPUs")


def _whole(recipe: run.Partial, name: str, default: int | None, where: str) -> int:
    value: Any = getattr(recipe.trainer, name, None)
    value = default if value is None else value
    if not is_whole(value, 1):
        raise SpecError(
            f"{where}trainer.{name}", got=value, expected="a whole number, 1 or more", fix="set it to 1 or more"
        )
    return value


def precision_name(recipe: Any, precision: str) -> str:
    """Return the planner's name for a recipe's precision, or NeMo's name if the planner does not know the precision.

    Args:
        recipe: recipe of a training job.
        precision: precision of the recipe's plugin, by Lightning's name; the recipe's settings add FP8 or NVFP4.
    """
    places = getattr(recipe.trainer, "plugins", None), recipe.model.config

    def given(name: str) -> Any:
        return next((value for place in places if (value := getattr(place, name, None))), None)

    if given("fp4"):
        return fp8_precision(given("fp4_recipe") or "nvfp4")
    if given("fp8"):
        return fp8_precision(given("fp8_recipe"))
    return "bf16" if precision.startswith("bf16") else precision


def check_recipe(recipe: run.Partial, where: str = "") -> None:
    """Check a recipe before it is launched.

    Args:
        recipe: recipe of a training job.
        where: prefix of the recipe's overrides, for error messages.

    Raises:
        SpecError: layout, model, data and ranks do not fit together, or the upcycling spec is invalid or does not
            match the model.
    """
    nodes, per_node = ranks_of(recipe, where)
    check_settings(recipe, where)
    try:
        precision = precision_name(recipe, "bf16")
        check_layout(recipe.trainer.strategy, recipe.model.config, recipe.data, nodes * per_node, precision=precision)
    except SpecError as error:
        raise error.renamed(lambda name: f"{where}{name}") from None


def check_settings(recipe: run.Partial, where: str = "") -> None:
    """Check everything in a recipe that does not depend on its ranks: names, values, and whether spec and model agree.

    Args:
        recipe: recipe of a training job.
        where: prefix of the recipe's overrides, for error messages.

    Raises:
        SpecError: a setting is invalid, or contradicts the spec.
    """
    _check_names(recipe.trainer.strategy, f"{where}trainer.strategy")
    check_values(recipe, "nemo", where)
    if reads_chat(recipe):
        _check_tuning(recipe, where)
    try:
        restore = setting(recipe, "resume.restore_config")
        if hasattr(restore, "spec"):
            precision, optimizer = setting(recipe, "trainer.plugins"), setting(recipe, "optim.config")
            check_masters(precision, optimizer, "optim.config.use_precision_aware_optimizer")
        if setting(restore, "spec"):
            check_spec(recipe.model.config, recipe_spec(recipe))
        elif hasattr(restore, "spec"):
            check_fields(recipe.model.config)
    except SpecError as error:  # names a setting by its path (with dots), or a field of the spec (without dots)
        spec = "resume.restore_config.spec."
        raise error.renamed(lambda name: f"{where}{name}" if "." in name else f"{where}{spec}{name}") from None


def _check_names(strategy: Any, where: str) -> None:
    """Check the names of a strategy's settings, because NeMo's class accepts unknown keywords and ignores them."""
    classes = (*strategy.__fn_or_cls__.__mro__, DistributedDataParallel)
    known = {name for cls in classes if "__init__" in vars(cls) for name in inspect.signature(cls.__init__).parameters}
    for name in strategy.__arguments__:
        if name not in known:
            raise SpecError(f"setting '{where}.{name}' does not exist.{did_you_mean(name, known, prefix=f'{where}.')}")


def reads_chat(recipe: run.Partial) -> bool:
    """Return whether a recipe fine-tunes on conversations."""
    from nemo_upcycle.data.chat_module import chat_data

    return getattr(recipe.data, "__fn_or_cls__", None) is chat_data


def _check_tuning(recipe: run.Partial, where: str) -> None:
    """Check the settings that a training on packed conversations depends on.

    Raises:
        SpecError: a setting does not work with packs.
    """
    check_packs(recipe, "nemo", where)
    _check_lora(recipe, where)
    if setting(recipe, "tokenizer") != "data":
        raise SpecError(
            field=f"{where}tokenizer",
            got=setting(recipe, "tokenizer"),
            expected="data, because a model from a dense checkpoint brings no tokenizer",
            fix="set it to data",
        )


def _check_lora(recipe: run.Partial, where: str) -> None:
    """Check that a LoRA run can be resumed, exported and reproduced under every layout.

    Raises:
        SpecError: a setting prevents resuming, exporting or reproducing.
    """
    from nemo_upcycle.trainers.nemo.lora import UpcycleLoRA

    if not setting(recipe, "peft"):
        return
    kind = getattr(recipe.peft, "__fn_or_cls__", type(recipe.peft))
    if kind is not UpcycleLoRA:
        raise SpecError(
            field=f"{where}peft",
            kind="refused",
            got=(
                f"is {kind.__name__}, which saves whole checkpoints; "
                "nemo_upcycle.trainers.nemo.lora.UpcycleLoRA saves the adapters only"
            ),
            fix="omit peft, and give the recipe peft_scheme='lora'; peft.dim sets the rank",
        )
    limits = (
        (
            "trainer.strategy.expert_model_parallel_size",
            lambda value: (value or 1) > 1,
            "1 with peft, because NeMo averages the experts' adapters over all ranks",
            "set it to 1",
        ),
        (
            "model.config.moe_grouped_gemm",
            bool,
            "False with peft, because NeMo gives grouped experts one common adapter, so they stay copies",
            "set it to False",
        ),
    )
    for name, is_wrong, expected, fix in limits:
        if is_wrong(value := setting(recipe, name)):
            raise SpecError(field=f"{where}{name}", got=value, expected=expected, fix=fix)


def parents_of(recipe: run.Partial) -> list[Parent]:
    """Return the dense models that a recipe starts from: the parent, then the branches."""
    restore = setting(recipe, "resume.restore_config")
    return [Parent(source) for source in (setting(restore, "path") or "", *(setting(restore, "branches") or []))]


def parent_of(parent: Parent, *, remote: bool = False) -> Architecture | None:
    """Return the architecture of a parent, or None if the architecture is not known.

    Args:
        parent: the dense parent.
        remote: whether to read the architecture from the hub if the parent is on the hub.
    """
    if not parent.address:
        return None
    return read_parent(parent) if remote else parent.architecture or known_parent(parent.address)


def parent_within_reach(parent: Parent) -> Architecture | None:
    """Return a parent's architecture, or None if this machine does not know it or cannot open the parent."""
    try:
        return parent_of(parent)
    except UpcycleError:
        return None


def check_parent(recipe: run.Partial, dense: Parent, where: str = "", *, remote: bool) -> None:
    """Check that a recipe's model has the parent's sizes and the spec's experts; skip a parent that is not known here.

    Args:
        recipe: recipe of a training job.
        dense: the dense parent.
        where: prefix of the recipe's overrides, for error messages.
        remote: whether to look for the parent on the hub, which needs the network.

    Raises:
        UpcycleError: sizes differ, the parent is missing, or the parent cannot become such a model.
    """
    asks = remote and not dense.address.startswith("asset://")  # asking for an asset would fetch and convert it
    parent = parent_of(dense, remote=asks)
    if parent is None:
        return
    require_buildable(parent)
    model = architecture_of(recipe.model.config, parent.vocab_size)
    spec = recipe_spec(recipe) if setting(recipe, "resume.restore_config.spec") else None
    try:
        wanted = parent.upcycled(spec) if spec else parent
    except UpcycleError as error:
        raise error.renamed(lambda name: f"{where}resume.restore_config.spec.{name}") from None
    for name in (*SIZES, "tied_embeddings", *(_EXPERTS if wanted.num_experts or model.num_experts else ())):
        got, expected = getattr(model, name), getattr(wanted, name)
        if got != expected:
            part = "transformer_layer_spec." if name in DECODER else ""
            raise UpcycleError(
                f"{where}model.config.{part}{FIELDS.get(name, name)}",
                got=got,
                expected=f"{expected}, as in {dense.address}",
                fix="use the recipe of a model of this family and size, or another dense checkpoint",
            )


def check_calibration(recipe: run.Partial, *, here: bool) -> None:
    """Check the calibration file that a recipe's spec needs, for a recipe that is trained without a chain.

    Args:
        recipe: recipe of a training job.
        here: whether the training starts on this machine, which must then have the file.

    Raises:
        UpcycleError: no file is named, or the file is missing, damaged, or not a calibration file.
    """
    spec = recipe_spec(recipe) if setting(recipe, "resume.restore_config.spec") else None
    if spec and (here or not spec.calibration):
        try:
            calibration_of(spec)
        except SpecError as error:
            raise error.renamed(lambda name: f"resume.restore_config.spec.{name}") from None


def check_data(recipe: run.Partial) -> None:
    """Check the data folder of a recipe if it has one: its files, its tokenizer and the length of its sources.

    If the dense model has not been fetched yet, its tokenizer is compared when the run starts.

    Raises:
        UpcycleError: the folder is unfinished, damaged or made with another tokenizer, or a source is shorter than a
            sequence.
    """
    from nemo_upcycle.data.blend_module import blend_data

    data = recipe.data
    if not (reads_chat(recipe) or data.__fn_or_cls__ is blend_data) or data.folder is None:
        return
    found: FinishedBlend | FinishedChat = (open_chat if reads_chat(recipe) else open_blend)(data.folder)
    found.require_length(data.seq_length)
    if Path(data.dense.removeprefix("nemo://")).is_dir():
        found.require_tokenizer_of(data.dense)
