"""Inputs of a run: the dense parent, the data and the suite. A command reads each file once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nemo_upcycle.data.blend import Blend, read_blend
from nemo_upcycle.data.chat.config import Chat, is_chat, read_chat
from nemo_upcycle.data.inputs import folders_of
from nemo_upcycle.data.suites.suite_config import SuiteConfig, folders_of_suite, read_suite_config
from nemo_upcycle.sources.find import Parent
from nemo_upcycle.utils.conf import is_conf_file
from nemo_upcycle.utils.validation import require_local


@dataclass(frozen=True)
class Inputs:
    """Inputs of a run, as named in the run's plan. Each input is read when it is first used.

    Args:
        dense: address of the dense parent; empty if there is no parent.
        data: a blend or conversations (a name in `conf`, a YAML file, JSON lines), or a finished folder; empty if
            there are no data.
        suite: a name in `conf/evaluation`, or a YAML file; empty if there is no suite.
    """

    dense: str
    data: str
    suite: str

    @cached_property
    def parent(self) -> Parent:
        """The dense parent, always the same object, so that its model is opened only once."""
        return Parent(self.dense)

    @cached_property
    def is_finished(self) -> bool:
        """Whether no data have to be built, because the data are a finished folder or the run has no data."""
        return not self.data or Path(self.data).is_dir()

    @cached_property
    def reads_chat(self) -> bool:
        """Whether the data are conversations, for fine-tuning."""
        return is_chat(self.data)

    @cached_property
    def blend(self) -> Blend | None:
        """Blend to build; None if there is no blend, or a finished folder is used."""
        return None if self.is_finished or self.reads_chat else read_blend(require_local("data", self.data))

    @cached_property
    def chat(self) -> Chat | None:
        """Conversations to pack; None if there are none, or a finished folder is used."""
        return read_chat(require_local("data", self.data)) if self.reads_chat and not self.is_finished else None

    @cached_property
    def suite_config(self) -> SuiteConfig:
        """Configuration of the evaluation suite."""
        return read_suite_config(require_local("evaluation", self.suite))

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """Folders and files of this machine that jobs read. YAML files are omitted: the run's folder keeps copies."""
        texts = folders_of(self.blend) if self.blend else []
        if self.chat:
            texts = [path.parent for path in self.chat.paths(fetch=False)]
        named = [text for text in (self.dense, self.data, self.suite) if not is_conf_file(text)]
        asked = folders_of_suite(self.suite, self.suite_config)
        paths = (*texts, *asked, *(Path(text.removeprefix("hf://")) for text in named))
        return tuple(dict.fromkeys(path for path in paths if path.is_absolute()))
