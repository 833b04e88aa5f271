"""Bits per byte of held-out text, for documents and for the sources of the documents."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from nemo_upcycle.evaluation.compare import cluster_sums, jackknife_stderr, left_out, statistic


#: The task of a suite that scores held-out text, and its metric.
TASK, METRIC = "heldout_perplexity", "bits_per_byte"
#: Key of the metric of held-out text in an evaluation's `metrics`.
BITS = f"{TASK}/{METRIC}"
#: Key of the same metric for the answers of conversations.
ANSWER_BITS = f"heldout_answers/{METRIC}"
#: Document -> its log-likelihood (nats) and its size (bytes).
Sums = dict[str, tuple[float, float]]


def document_sums(evaluation: Mapping[str, Any]) -> Sums:
    """Return the sums of every held-out document over the document's windows.

    Args:
        evaluation: result of `ask` for a suite with `TASK`.
    """
    items = evaluation["items"][TASK]
    documents = [item["cluster"] for item in items]
    sums = cluster_sums(METRIC, [item["scores"][METRIC] for item in items], documents)
    return dict(zip(dict.fromkeys(documents), sums, strict=True))


def bits_per_byte(sums: Sums) -> float:
    """Return the bits per byte of all documents together.

    Example:
        >>> round(bits_per_byte({"a": (-69.3147, 50), "b": (-69.3147, 50)}), 4)
        2.0
    """
    return statistic(METRIC, list(sums.values()))


def by_source(sums: Sums) -> dict[str, dict[str, Any]]:
    """Return the bits per byte of every source, because a blend's average can hide that one source got worse.

    Args:
        sums: sums of documents, each named `source/id`.

    Returns:
        Source -> `value`, `stderr` (a jackknife over the source's documents; None for a single document) and
        `documents` (number of documents).

    Example:
        >>> round(by_source({"law/1": (-69.3147, 50), "web/1": (-34.6574, 50)})["law"]["value"], 4)
        2.0
    """
    sources: dict[str, Sums] = defaultdict(dict)
    for document, its in sums.items():
        sources[document.partition("/")[0]][document] = its
    return {
        source: {
            "value": bits_per_byte(documents),
            "stderr": jackknife_stderr(left_out(METRIC, list(documents.values()))),
            "documents": len(documents),
        }
        for source, documents in sorted(sources.items())
    }
