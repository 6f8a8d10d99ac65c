"""Memory predicted in closed form, by simulation, and counted in real steps on the CPU.

    python -m benchmarks.memory

Nothing but the real steps of small models is measured here, and no GPU is used: every other figure is a prediction for one.
The closed form is compared with the simulation on a grid of models, methods and options, and the simulation with what
torch's allocator on the CPU hands out in real steps. Then follow predictions for LLaMA-7B and -13B, the update step against
an ordinary one, the paper's figure for 1B, and how memory grows.

Results: results/memory.json and results/memory.md.
"""

import argparse
import json
import os
import warnings


os.environ.setdefault("OMP_NUM_THREADS", "1")
# the profiler announces every start and stop
os.environ.setdefault("KINETO_LOG_LEVEL", "5")

from benchmarks.common import RESULTS, write_json, write_markdown
from benchmarks.memory.predictions import PARTS
from benchmarks.memory.tables import markdown


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="keep the other parts' results")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    kept = RESULTS / "memory.json"
    results = json.loads(kept.read_text())["results"] if kept.exists() else {}
    for part in options.only:
        results[part] = PARTS[part]()
        write_json("memory.json", {"results": results})
    if set(results) == set(PARTS):
        write_markdown("memory.md", markdown(results))


if __name__ == "__main__":
    main()
