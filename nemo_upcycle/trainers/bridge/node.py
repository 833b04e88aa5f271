"""The configuration of a Bridge run with its node `upcycling`: the dense parent, and how the run upcycles it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path

from megatron.bridge.training.config import ConfigContainer

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.planning.hardware import known_parent
from nemo_upcycle.sources.fetch import ensure_dense, tokenizer_folder
from nemo_upcycle.sources.find import find_parent
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.bridge.settings import UpcycleSettings


#: The fields of `UpcycleSpec` in a class that Bridge's overrides can change; the spec itself is frozen.
_SpecFields = make_dataclass(
    "_SpecFields", [(one.name, one.type, one.default) for one in fields(UpcycleSpec)], kw_only=True
)


@dataclass(kw_only=True)
class Upcycling(_SpecFields):  # type: ignore[valid-type, misc]
    """The node `config.upcycling`. The node has all fields of `UpcycleSpec`, and the fields below.

    Args:
        hf_model_path: dense checkpoint: a folder that every rank sees, ORG/NAME or hf://ORG/NAME, or an asset.
        branches: further dense checkpoints of the same architecture (Branch-Train-MiX).
        non_expert_weights: source of all non-expert weights if there are branches: the `first` checkpoint or the
            `mean`.

    Example:
        >>> Upcycling(hf_model_path="/models/Llama-3-8B", num_experts=4).spec.num_experts  # doctest: +SKIP
        4
    """

    hf_model_path: str
    branches: list[str] = field(default_factory=list)
    non_expert_weights: str = "first"

    @property
    def spec(self) -> UpcycleSpec:
        """The spec that upcycles the parent.

        Raises:
            SpecError: a value is out of range or unknown, or values contradict each other.
        """
        return UpcycleSpec(**{one.name: getattr(self, one.name) for one in fields(UpcycleSpec)})

    def change(self, spec: UpcycleSpec) -> None:
        """Set all fields to the values of a spec."""
        for name, value in asdict(spec).items():
            setattr(self, name, value)


@dataclass(kw_only=True)
class UpcyclingConfig(ConfigContainer):
    """Bridge's configuration of a run, with the node `upcycling` and the settings of this package.

    Args:
        upcycle: see `UpcycleSettings`.
        upcycling: the parent, and how to upcycle it; None: nothing is upcycled.
        hf_model_path: dense checkpoint that the run trains as it is, if there is no `upcycling`; None: the run starts
            as Bridge's own runs do.
    """

    upcycle: UpcycleSettings = field(default_factory=UpcycleSettings)
    upcycling: Upcycling | None = None
    hf_model_path: str | None = None

    @classmethod
    def of(cls, config: ConfigContainer) -> UpcyclingConfig:
        """Return a configuration of this class that shares all parts with another configuration."""
        return cls(**{one.name: getattr(config, one.name) for one in fields(config) if one.init})

    @property
    def parents(self) -> tuple[str, ...]:
        """Addresses of the dense checkpoints that the run starts from; empty if there are none."""
        if self.upcycling:
            return (self.upcycling.hf_model_path, *self.upcycling.branches)
        return (self.hf_model_path,) if self.hf_model_path else ()

    @property
    def spec(self) -> UpcycleSpec | None:
        """The spec that upcycles the run's parent; None: nothing is upcycled."""
        return self.upcycling.spec if self.upcycling else None

    def validate(self) -> None:
        """Complete and check the run, and register the hook that fills it. Bridge calls this when a rank starts."""
        from nemo_upcycle.trainers.bridge.upcycling import prepare

        if self.parents:
            prepare(self)
        super().validate()


def folder_of(address: str) -> Path:
    """Return the folder of a dense checkpoint; fetch or make the folder if it is not on this machine."""
    return Path(address).absolute() if Path(address).is_dir() else ensure_dense(address)


def architecture_at(address: str) -> Architecture:
    """Return the architecture of a dense checkpoint; download its configuration unless the parent is known.

    Args:
        address: see `Upcycling`.

    Raises:
        UpcycleError: the checkpoint does not exist, or cannot be reached.
    """
    kind, name = find_parent(address)
    if kind == "folder":
        return read_architecture(Path(name))
    return known_parent(f"{'asset' if kind == 'asset' else 'hf'}://{name}") or read_architecture(
        tokenizer_folder(address)
    )
