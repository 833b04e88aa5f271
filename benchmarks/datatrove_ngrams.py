"""Run datatrove's n-gram filter on documents, in a separate environment: `python datatrove_ngrams.py WORK.json`.

The index holds the n-grams of 13 words from our renderings of the items, as in our own search. Texts are split into
words at blanks, which is faster than any tokenizer of datatrove. The program prints the removed documents and the CPU
seconds of each list of documents as JSON.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter
from datatrove.utils.text import ngrams, simplify_text
from datatrove.utils.word_tokenizers import WordTokenizer


class Blanks(WordTokenizer):
    """Word tokenizer that splits at blanks, because the text contains no punctuation."""

    def word_tokenize(self, text: str) -> list[str]:
        """Split a text at blanks."""
        return text.split()

    sent_tokenize = span_tokenize = word_tokenize


def main() -> None:
    """Build the index, filter the documents, and print the result."""
    work = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    config = NGramsDecontConfig(n_grams=13)
    with tempfile.TemporaryDirectory() as folder:
        chosen = NGramsDecontFilter(folder, config=config, language=Blanks())
        hashes = set()  # the same steps as in datatrove's indexer, which needs lighteval
        for text in work["renderings"]:
            words = chosen.tokenizer.word_tokenize(simplify_text(text, config.norm_config))
            hashes.update(chosen.hash_func(" ".join(gram)) for gram in ngrams(words, config.n_grams))
        np.array(sorted(hashes), config.hash_config.np_descr).tofile(f"{folder}/mmlu.index.hashes")
        chosen.load_index_hashes()
    result = {}
    for name, texts in work["documents"].items():
        documents = [Document(text=text, id=str(number)) for number, text in enumerate(texts)]
        start_s = time.process_time()
        removed = [number for number, document in enumerate(documents) if chosen.filter(document) is not True]
        result[name] = {"removed": removed, "seconds": time.process_time() - start_s}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
