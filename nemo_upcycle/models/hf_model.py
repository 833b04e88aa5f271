"""Load Hugging Face models and tokenizers from transformers 4 and 5, with transformers 4 or 5 installed.

transformers 4 silently ignores the `rope_parameters` of transformers 5, so the classes of transformers 4 use their
default rotary base. transformers 5 also has new names for tokenizers and special tokens, which transformers 4 does not
know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.compatibility import releases_with
from nemo_upcycle.models.families import Family, find_family
from nemo_upcycle.models.hf_config import read_architecture, rope_settings
from nemo_upcycle.models.mapping import hf_names, mapping_of_hf
from nemo_upcycle.models.rotary import PROPORTIONAL
from nemo_upcycle.models.sharding import hf_shapes, tensor_shape
from nemo_upcycle.models.stacked import EAGER, lies_transposed, needs_eager_experts, stacks
from nemo_upcycle.models.wrapper import INDEX, SINGLE, Wrapper, read_config, wrapper_of
from nemo_upcycle.utils.files import read_json


#: Name of the fast tokenizer in transformers 5. transformers 4 has another name for this tokenizer.
_FAST = "TokenizersBackend"
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@contextmanager
def errors_only() -> Iterator[None]:
    """Show only the errors of transformers, without progress bars."""
    from transformers import logging

    verbosity, shows_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_bars:
            logging.enable_progress_bar()


def load_model(folder: Path, layers: int | None = None, **options: Any) -> Any:
    """Load a causal language model with the rotary embedding of its `config.json`.

    If the model has other parts beside a text model, load only the text model, with a text-only class.

    Args:
        folder: Hugging Face folder of the model.
        layers: number of layers to load, counted from the first layer; None for all layers.
        options: further options of `from_pretrained`.

    Raises:
        CheckpointError: settings of the rotary embedding contradict each other, or are unknown.
    """
    import transformers

    wrapper, pair = wrapper_of(read_json(folder / "config.json")), _computed_as(read_config(folder))
    config, source = _first_layers(_config(folder), layers), str(folder)
    kind: Any = transformers.AutoModelForCausalLM
    if wrapper or pair:
        options["state_dict"] = _state_dict(folder, wrapper, pair[1] if pair else None)
        family = pair[1] if pair else find_family(read_architecture(folder).hf_class)
        assert family
        kind, source = getattr(transformers, family.saved_as or family.hf_class), ""
    loaded = kind.from_pretrained(source or None, config=config, **_LOCAL, **options)
    _choose_experts(loaded[0] if isinstance(loaded, tuple) else loaded)
    return loaded


def unknown_because(folder: Path, text_class: str) -> str:
    """Return why the installed transformers has no class for a folder's model; "" if there is a class.

    Args:
        folder: Hugging Face folder, with the names of its class and model type in `config.json`.
        text_class: class of the text model.
    """
    import transformers

    said = read_json(folder / "config.json")
    hf_class, text = said["architectures"][0], said.get("text_config") or {}
    kinds = [kind for part in (said, text) if (kind := part.get("model_type"))]
    unknown = [kind for kind in kinds if kind not in transformers.CONFIG_MAPPING]
    if unknown or not hasattr(transformers, hf_class):
        return f"it does not know {unknown[0] if unknown else hf_class}{_known_in(text_class)}"
    return ""


def load_as_written(folder: Path, layers: int | None = None, **options: Any) -> Any:
    """Load a folder as its model card says, with the class that its `config.json` names.

    Args:
        folder: Hugging Face folder of the model.
        layers: number of layers to load, counted from the first layer; None for all layers.
        options: further options of `from_pretrained`.

    Raises:
        ValueError: tensors are missing in the folder, have another shape, or are not used.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
    kind = getattr(transformers, config.architectures[0])
    config = _first_layers(config, layers)
    model, found = kind.from_pretrained(folder, config=config, output_loading_info=True, **_LOCAL, **options)
    unread = [] if layers else found["unexpected_keys"]  # the tensors of other layers
    if wrong := [*found["missing_keys"], *found["mismatched_keys"], *unread]:
        raise ValueError(f"{len(wrong)} tensors of the folder and the class do not agree, such as {wrong[0]}")
    return model.eval()


def _first_layers(config: Any, layers: int | None) -> Any:
    """Return the configuration of the same model with fewer layers.

    Args:
        config: configuration of a model, or of a model with a text model inside.
        layers: number of layers; None returns `config` itself.
    """
    if layers is None:
        return config
    settings = config.to_dict()
    text = settings.get("text_config") or settings
    total = text["num_hidden_layers"]
    for name, value in text.items():
        if isinstance(value, list) and len(value) == total:  # a value for each layer
            text[name] = value[:layers]
    text["num_hidden_layers"] = layers
    return type(config).from_dict(settings)


def _choose_experts(model: Any) -> None:
    """Let transformers 5 multiply expert by expert if its grouped product does not accept the experts' matrices."""
    if hasattr(model, "set_experts_implementation"):
        matrices = [each for name, each in model.named_parameters() if ".experts." in name and each.dim() == 3]
        if any(needs_eager_experts(each.shape[1:], each.itemsize) for each in matrices):
            model.set_experts_implementation(EAGER)


def require_known(folder: Path) -> None:
    """Check that the installed transformers knows the class of a folder's model.

    Raises:
        CheckpointError: the class is unknown.
    """
    _config(folder)


def empty_model(folder: Path) -> Any:
    """Return a Hugging Face model without weights, in float32 on the meta device.

    The buffers that the folder stores are filled with zeros.

    Args:
        folder: Hugging Face folder of the model.

    Raises:
        CheckpointError: `load_model` refuses the folder, or the model has unknown buffers beside its weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = _config(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RotaryEmbedding"):
            kind = {"rope_type": module.rope_type} if "rope_type" in signature(type(module)).parameters else {}
            _set(model, name, type(module)(config=module.config, **kind))
    for name in [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        shapes = hf_shapes(read_architecture(folder))
        if name.endswith(".embed_scale"):  # the buffer of Gemma models
            _set(model, name, torch.tensor(config.hidden_size**0.5))
        if name in shapes:
            _set(model, name, torch.zeros(shapes[name]))
    if left := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise CheckpointError(
            f"{type(model).__name__} of {folder}",
            kind="refused",
            got=f"cannot be loaded in parts: its code computes {', '.join(left)} only when a whole model is made",
            fix="use a model of a family in nemo_upcycle.models.families",
        )
    return model


def stored_name(name: str, arch: Architecture) -> str:
    """Return the name under which a dense model's folder stores a parameter of the model's transformers class.

    Args:
        name: name of the parameter in the transformers class.
        arch: architecture of the model.
    """
    family = find_family(arch.hf_class)
    if not family or not family.computed_as:
        return name
    mapping, part, layer, _ = mapping_of_hf(name, replace(arch, hf_class=family.computed_as))
    return family.names[mapping.role][part].format(layer=layer)


def _set(model: Any, name: str, value: Any) -> None:
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute, value)


def _config(folder: Path) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    path, said = folder / "config.json", read_config(folder)
    wrapper = wrapper_of(read_json(path))
    if pair := _computed_as(said):
        family, theirs = pair
        named = {family.spelling.get(name, name): value for name, value in said.items()}
        named = {**family.defaults, **named, **rope_settings(said, str(path)), "model_type": theirs.model_type}
        return type(AutoConfig.for_model(theirs.model_type)).from_dict(named)
    if (wrapper or find_family(*_class_of(said))) and said.get("model_type") not in CONFIG_MAPPING:
        hf_class = read_architecture(folder).hf_class
        raise CheckpointError(
            f"Model {folder}",
            kind="missing",
            got=(f"needs a newer transformers: {__version__} does not know {hf_class}{_known_in(hf_class)}"),
            fix=(
                "run `pip install --upgrade transformers` in an environment of its own, because trainers need older "
                "releases"
            ),
        )
    rope = rope_settings(said, str(path)) if said.get("rope_parameters") else {}
    if (rope.get("rope_scaling") or {}).get("rope_type") == PROPORTIONAL:  # transformers 4 lacks this scaling
        rope = {}
    if wrapper:
        return AutoConfig.for_model(**said | rope)
    config = AutoConfig.from_pretrained(folder, **_LOCAL)
    return type(config).from_dict(said | rope) if rope else config


def _known_in(hf_class: str) -> str:
    """Return which releases run a class, as the end of a sentence; "" if no such release is known."""
    found = [release.removeprefix("transformers ") for release in releases_with(hf_class)]
    return f", but {' and '.join(found)} does" if found else ""


def _class_of(said: dict[str, Any]) -> tuple[str, str]:
    return (said.get("architectures") or [""])[0], str(said.get("model_type"))


def _computed_as(said: dict[str, Any]) -> tuple[Family, Family] | None:
    """Return a model's family and the family whose class computes the model; None if there is no second family."""
    family = find_family(*_class_of(said))
    theirs = find_family(family.computed_as) if family else None
    return (family, theirs) if family and theirs else None


def _state_dict(folder: Path, wrapper: Wrapper | None, theirs: Family | None) -> dict[str, Any]:
    """Return a folder's tensors in the form of another class. Files are memory-mapped, not read.

    Args:
        folder: folder of the model.
        wrapper: class around the text model, whose other parts are omitted; None if there are no other parts.
        theirs: family whose tensor names are used; None to keep the names in the folder.
    """
    from safetensors import safe_open

    arch, index, tensors = read_architecture(folder), folder / INDEX, dict[str, Any]()
    family = find_family(arch.hf_class)
    for file in sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [SINGLE]:
        with safe_open(folder / file, "pt") as opened:
            names = opened.keys()
            for name in names:
                if (wrapper and wrapper.part_of(name)) or (family and family.is_mtp(name, arch.num_layers)):
                    continue
                tensors[wrapper.text_name(name) if wrapper else name] = opened.get_tensor(name)
    return dict(_renamed(tensors, arch, theirs)) if theirs else tensors


def _renamed(tensors: dict[str, Any], arch: Architecture, theirs: Family) -> Iterator[tuple[str, Any]]:
    """Yield tensors in the form of another class, with one tensor for each expert."""
    experts = stacks(hf_names(arch))
    for name, tensor in tensors.items():
        for expert, own in enumerate(experts.get(name, [name])):
            mapping, part, layer, _ = mapping_of_hf(own, arch)
            one = tensor[expert] if name in experts else tensor
            one = one.T if lies_transposed(own, tuple(one.shape), tensor_shape(mapping, part, arch)) else one
            names = dict.fromkeys(theirs.names[mapping.role][each] for each in mapping.together(part))
            for called, piece in zip(names, one.chunk(len(names)), strict=True):
                yield called.format(layer=layer, expert=expert), piece


def other_special_tokens(tokenizer: Any) -> list[str]:
    """Return the special tokens without a role. transformers 4 and 5 store these tokens under different names."""
    named = "additional_special_tokens"
    found: list[str] = getattr(tokenizer, named if hasattr(tokenizer, named) else "extra_special_tokens")
    return found


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a Hugging Face folder."""
    import transformers

    path, options = folder / "tokenizer_config.json", dict(_LOCAL)
    said = read_json(path) if path.is_file() and not hasattr(transformers, _FAST) else {}
    if isinstance(special := said.get("extra_special_tokens"), list):
        options |= {"additional_special_tokens": special, "extra_special_tokens": {}}
    if said.get("tokenizer_class") != _FAST:
        return transformers.AutoTokenizer.from_pretrained(folder, **options)
    with errors_only():  # hide the warning that the class has another name
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder, **options)
