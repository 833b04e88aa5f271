"""`python -m tests.functional.ft_rank PARENT DATA FOLDER OPTIONS`: one rank of a tiny training, under a launcher."""

import json
import sys

from tests.functional.runs import train_rank


if __name__ == "__main__":
    parent, data, folder, options = sys.argv[1:]
    train_rank(parent, data, folder, json.loads(options))
