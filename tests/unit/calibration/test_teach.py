"""What a dense parent answers in packs: the model's own probabilities, the same folder whatever the stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import open_dense
from nemo_upcycle.calibration import teach as module
from nemo_upcycle.calibration.teach import Pack, TeacherReport, teach
from nemo_upcycle.calibration.teacher import TOP_K, Teacher
from nemo_upcycle.errors import CheckpointError, UpcycleError
from nemo_upcycle.models.hf_model import load_model
from tests.models import write_llama, write_qwen3


def _packs(vocab_size: int = 250, count: int = 5, size: int = 160) -> list[Pack]:
    """Return packs of three conversations each, of many lengths."""
    generator, packs = torch.Generator().manual_seed(3), []
    for number in range(count):
        lengths = [20 + number, 64, 30 - number]
        ids = [torch.randint(vocab_size, (length + 1,), generator=generator) for length in lengths]
        scored = [torch.rand(length, generator=generator) < 0.4 for length in lengths]
        labels = torch.full((size,), 2)
        labels[: sum(lengths)] = torch.cat([one[1:] for one in ids])
        packs.append(Pack(labels, tuple((one[:-1], places) for one, places in zip(ids, scored, strict=True))))
    return packs


def _taught(dense: Path, folder: Path, packs: list[Pack], **options: Any) -> TeacherReport:
    with open_dense(dense) as source:
        return teach(source, folder, packs, {"of": "a test"}, **options)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("dense"), layers=2)


@pytest.mark.parametrize(
    ("write", "options"),
    [(write_llama, {}), (write_llama, {"tied": True}), (write_qwen3, {})],
    ids=["Llama", "tied Llama", "Qwen3"],
)
def test_answers_are_those_of_the_model_for_each_conversation_alone(tmp_path: Path, write: Any, options: Any) -> None:
    folder, packs = write(tmp_path / "dense", layers=2, **options), _packs()
    report = _taught(folder, tmp_path / "teacher", packs)
    teacher, model = Teacher(tmp_path / "teacher"), load_model(folder, dtype=torch.float32).eval()
    covered = []
    for pack in packs:
        found, wanted = teacher.of(pack.labels), []
        for ids, is_scored in pack.sequences:
            with torch.no_grad():
                wanted.append(model(ids[None]).logits[0].log_softmax(-1)[is_scored])
        wanted_NV = torch.cat(wanted)
        assert found.places.tolist() == torch.cat([one for _, one in pack.sequences]).nonzero()[:, 0].tolist()
        top = wanted_NV.topk(TOP_K)
        torch.testing.assert_close(found.log_probs[:, :-1], top.values, rtol=0, atol=2e-5)
        torch.testing.assert_close(wanted_NV.gather(-1, found.tokens.long()), top.values, rtol=0, atol=2e-5)
        torch.testing.assert_close(found.log_probs.exp().sum(-1), torch.ones(len(wanted_NV)), rtol=0, atol=1e-5)
        covered.append(top.values.exp().sum(-1))
    assert report.covered == pytest.approx(float(torch.cat(covered).mean()), abs=1e-5)
    assert (report.packs, report.answer_tokens) == (5, sum(map(len, covered)))


@pytest.mark.parametrize("stop", [0, 1])
def test_a_stopped_pass_goes_on_with_its_part_and_leaves_the_same_files(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    monkeypatch.setattr(module, "_PART_TOKENS", 200)
    _taught(dense, tmp_path / "whole", _packs(), threads=1)
    computed, kept = [], module._answered

    def answered(model: Any, packs: Any, *others: Any) -> Any:
        computed.append(len(computed))
        if len(computed) == stop + 1:
            raise KeyboardInterrupt
        return kept(model, packs, *others)

    monkeypatch.setattr(module, "_answered", answered)
    with pytest.raises(KeyboardInterrupt):
        _taught(dense, tmp_path / "teacher", _packs())
    assert not (tmp_path / "teacher").exists()
    assert _taught(dense, tmp_path / "teacher", _packs(), threads=3).made
    assert len(computed) == 4
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == ["00000.safetensors", "00001.safetensors", "00002.safetensors", "_SUCCESS.json"]
    for name in names:
        assert (tmp_path / "teacher" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_folder_is_kept_and_one_of_other_models_is_refused(dense: Path, tmp_path: Path) -> None:
    assert _taught(dense, tmp_path / "teacher", _packs()).made
    assert not _taught(dense, tmp_path / "teacher", _packs()).made
    other = write_llama(tmp_path / "other", layers=2, intermediate_size=128)
    with pytest.raises(UpcycleError, match="answers of other packs or models"):
        _taught(other, tmp_path / "teacher", _packs())


def test_a_pack_that_was_not_answered_and_tokens_of_another_vocabulary_are_refused(
    dense: Path, tmp_path: Path
) -> None:
    _taught(dense, tmp_path / "teacher", _packs())
    with pytest.raises(UpcycleError, match="a pack that is none of them"):
        Teacher(tmp_path / "teacher").of(torch.zeros(160))
    with pytest.raises(CheckpointError, match="expected numbers below 250"):
        _taught(dense, tmp_path / "other", _packs(vocab_size=400))
