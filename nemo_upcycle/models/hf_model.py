"""Hugging Face models and tokenizers, loaded as transformers 4 or 5 saved them, by whichever of the two is here.

transformers 4 leaves the `rope_parameters` of 5 unread, without a word: its classes take their default rotary base.
Nor does it know how 5 names tokenizers and their special tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.hf_config import read_architecture, rope_settings
from nemo_upcycle.models.sharding import hf_shapes
from nemo_upcycle.models.wrapper import INDEX, SINGLE, Wrapper, read_config, wrapper_of
from nemo_upcycle.utils.files import read_json


#: What transformers 5 calls its fast tokenizer, which 4 has under another name.
_FAST = "TokenizersBackend"
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@contextmanager
def errors_only() -> Iterator[None]:
    """Let transformers show its errors only."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def load_model(folder: Path, **options: Any) -> Any:
    """Return a causal language model with the rotary embedding that its `config.json` says.

    Of a model with other parts it is the text model, in a class of its own.

    Args:
        folder: its Hugging Face folder.
        options: further ones of `from_pretrained`.

    Raises:
        CheckpointError: settings of the rotary embedding contradict each other, or are not known.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    config, wrapper = _config(folder), wrapper_of(read_json(folder / "config.json"))
    if wrapper is None:
        return AutoModelForCausalLM.from_pretrained(folder, config=config, **_LOCAL, **options)
    text_class = getattr(transformers, read_architecture(folder).hf_class)
    return text_class.from_pretrained(None, config=config, state_dict=_text_weights(folder, wrapper), **options)


def _text_weights(folder: Path, wrapper: Wrapper) -> dict[str, Any]:
    """Return the text model's tensors among those of all parts, as they lie in the mapped files."""
    from safetensors import safe_open

    index = folder / INDEX
    weights: dict[str, Any] = {}
    for file in sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [SINGLE]:
        with safe_open(folder / file, "pt") as opened:
            names = opened.keys()
            weights |= {wrapper.text_name(one): opened.get_tensor(one) for one in names if not wrapper.part_of(one)}
    return weights


def empty_model(folder: Path) -> Any:
    """Return a Hugging Face model in float32 on the meta device, ready to compute except that it has no weights.

    Buffers that are stored in the folder are zeros.

    Args:
        folder: its Hugging Face folder.

    Raises:
        CheckpointError: `load_model` refuses it, or the folder holds more than weights of the model.
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
        if name.endswith(".embed_scale"):  # Gemma's
            _set(model, name, torch.tensor(config.hidden_size**0.5))
        if name in shapes:
            _set(model, name, torch.zeros(shapes[name]))
    if left := [name for name, buffer in model.named_buffers() if buffer.is_meta]:
        raise CheckpointError(
            f"{type(model).__name__} of {folder}",
            got=f"values beside its weights: {', '.join(left)}",
            expected="none, for it is filled part by part",
            fix="use a parent of a class in models/families",
        )
    return model


def _set(model: Any, name: str, value: Any) -> None:
    module, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(module), attribute, value)


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    path, said = folder / "config.json", read_config(folder)
    as_said = said | (rope_settings(said, str(path)) if said.get("rope_parameters") else {})
    if wrapper_of(read_json(path)):
        return AutoConfig.for_model(**as_said)
    config = AutoConfig.from_pretrained(folder, **_LOCAL)
    return type(config).from_dict(as_said) if said.get("rope_parameters") else config


def other_special_tokens(tokenizer: Any) -> list[str]:
    """Return a tokenizer's special tokens that have no role; transformers 5 has another name for them."""
    named = "additional_special_tokens"
    found: list[str] = getattr(tokenizer, named if hasattr(tokenizer, named) else "extra_special_tokens")
    return found


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a Hugging Face folder."""
    import transformers

    path, options = folder / "tokenizer_config.json", dict(_LOCAL)
    said = read_json(path) if path.is_file() and not hasattr(transformers, _FAST) else {}
    if isinstance(special := said.get("extra_special_tokens"), list):
        options |= {"additional_special_tokens": special, "extra_special_tokens": {}}
    if said.get("tokenizer_class") != _FAST:
        return transformers.AutoTokenizer.from_pretrained(folder, **options)
    with errors_only():  # not that the class has another name
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder, **options)
