"""Write the tokens of a plan in the data environment: `python writing_step.py FOLDER`. FOLDER contains `plan.json`.

Prints JSON with the CPU seconds of each step.
"""

import json
import sys
from pathlib import Path

from nemo_upcycle.data.engine.pipelines import RunOn, executor, stages
from nemo_upcycle.data.engine.tasks import load_plan
from nemo_upcycle.data.engine.tokenise import FASTOKENS


def main() -> None:
    """Run the writing step, and print its times."""
    folder = Path(sys.argv[1])
    plan = load_plan(folder / "plan.json")
    (stage,) = stages(plan, FASTOKENS)
    executor(plan, stage, RunOn(), Path(sys.prefix)).run()
    (record,) = (folder / "stats").glob("*.json")
    print(json.dumps(json.loads(record.read_text())["seconds"]))


if __name__ == "__main__":
    main()
