"""The configuration of a set of conversations: files, sequence length, and held-out shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

from nemo_upcycle.data.finished import MANIFEST
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.conf import Conf, as_dataclass, is_conf_file, overridden, packaged_names, read_conf
from nemo_upcycle.utils.files import read_json, read_text
from nemo_upcycle.utils.validation import one_of, valid


TOO_LONG = ("cut", "drop")
#: Value of `kind` in the manifest of a finished folder.
KIND = "conversations"
_LINES = (".jsonl", ".json")
_ASSET = "asset://"


@dataclass
class ChatConfig:
    """A set of conversations; `conf/chat/messages.yaml` explains every key.

    Attributes:
        files: JSON lines files, as paths, patterns or `asset://NAME`; each line is a conversation.
        tokenizer: address of the dense model whose tokenizer and chat template are used.
        seq_length: tokens in a sequence, into which several conversations are packed.
        validation: share of the conversations held back for the validation loss.
        heldout: share of the conversations held back to score their answers after training.
        too_long: treatment of a conversation of more than `seq_length` tokens: `cut` keeps the conversation up to the
            last answer that fits, `drop` removes the conversation.
        max_lost: largest share of the lines that may be invalid; above this share, the build fails.
        chat_template: Jinja file that replaces the tokenizer's own template.
        license: licence of the conversations, for the model card.
        seed: random seed that chooses the held-out conversations and the order.
    """

    files: list[str] = field(metadata=valid("at least one", len))
    tokenizer: str | None = None
    seq_length: int = field(default=2048, metadata=valid("2 or more", lambda tokens: tokens >= 2))
    validation: float = field(
        default=0.02, metadata=valid("more than 0, less than 0.5", lambda share: 0 < share < 0.5)
    )
    heldout: float = field(default=0.02, metadata=valid("more than 0, less than 0.5", lambda share: 0 < share < 0.5))
    too_long: str = field(default="cut", metadata=one_of(TOO_LONG))
    max_lost: float = field(default=0.1, metadata=valid("0 to 1", lambda share: 0 <= share <= 1))
    chat_template: str | None = None
    license: str = "not stated"
    seed: int = field(default=1234, metadata=valid("0 or more", lambda seed: seed >= 0))


@dataclass(frozen=True)
class Chat:
    """A set of conversations whose configuration was read and checked.

    Attributes:
        name: name of its file, without suffix.
        folder: folder that relative paths start from.
        config: content of the file.
    """

    name: str
    folder: Path
    config: ChatConfig

    @property
    def assets(self) -> list[str]:
        """Return the names of the assets that are fetched on first use."""
        return [entry.removeprefix(_ASSET) for entry in self.config.files if entry.startswith(_ASSET)]

    def paths(self, *, fetch: bool = True) -> list[Path]:
        """Return the files in reading order, each once.

        Args:
            fetch: whether to fetch assets; otherwise they are omitted.

        Raises:
            UpcycleError: an entry matches no file.
        """
        found: list[Path] = []
        for entry in self.config.files:
            if entry.startswith(_ASSET) and not fetch:
                continue
            matches = self._matches(entry)
            if not matches:
                raise UpcycleError(
                    f"{self.name}: files", kind="missing", got=f"{entry} is not a file", fix="give files of JSON lines"
                )
            found += matches
        return list(dict.fromkeys(found))

    def template_text(self) -> str | None:
        """Return the chat template that replaces the tokenizer's own template, or None.

        Raises:
            UpcycleError: the file cannot be read.
        """
        path = self.config.chat_template
        return read_text(self.folder / Path(path).expanduser()) if path else None

    def _matches(self, entry: str) -> list[Path]:
        if entry.startswith(_ASSET):
            from nemo_upcycle.sources.demo.asset_texts import fetch_conversations

            return [fetch_conversations(entry.removeprefix(_ASSET))]
        pattern = str(self.folder / Path(entry).expanduser())
        return sorted(path for name in glob(pattern, recursive=True) if (path := Path(name)).is_file())


def read_chat(name: str | Path, overrides: Sequence[str] = ()) -> Chat:
    """Read the configuration of a set of conversations.

    Args:
        name: name in `conf/chat`, path of a YAML file, or path of a file of JSON lines.
        overrides: settings to change, as in `seq_length=4096`.

    Raises:
        UpcycleError: there is no such set, or a key or value is wrong.

    Example:
        >>> read_chat("messages").config.too_long
        'cut'
    """
    path = Path(name).expanduser()
    if path.suffix in _LINES:
        conf = Conf({"files": [str(path.absolute())]}, path, path.absolute().parent)
    else:
        conf = read_conf("chat", name, "conversations")
    config = as_dataclass(str(conf.path), overridden(conf, overrides), ChatConfig, "chat")
    return Chat(path.stem, conf.folder, config)


def is_chat(data: str) -> bool:
    """Return whether a run reads conversations rather than texts.

    Args:
        data: value of a pipeline's `data=`. The value means conversations if it is a name in `conf/chat`, a YAML file
            that names `files`, a file of JSON lines, or a finished folder of `nemo-upcycle chat`.

    Example:
        >>> is_chat("messages"), is_chat("sotu"), is_chat("mine.jsonl")
        (True, False, True)
    """
    path = Path(data).expanduser()
    if path.is_dir():
        manifest = read_json(path / MANIFEST) if (path / MANIFEST).is_file() else None
        return isinstance(manifest, dict) and manifest.get("kind") == KIND
    if is_conf_file(data):
        return path.is_file() and "files" in read_conf("chat", path, "data").content
    return path.suffix in _LINES or data in packaged_names("chat")
