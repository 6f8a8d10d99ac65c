"""Which families of models LoQT trains, tried on tiny models of random weights with their default targets.

    python -m benchmarks.families [--packed] [NAME ...]

Each is trained for 12 steps with 3 updates, saved, loaded again, merged and exported. `--packed` does the same on a base that
is in 4 bits from the start, and writes nothing. The table is written to docs/families.md, between its two marks, and the
figures to results/families.json. It takes about a minute.
"""

import argparse
import os
import sys
import warnings


os.environ.setdefault("OMP_NUM_THREADS", "1")

from transformers.utils import logging

from benchmarks.common import ROOT, markdown_table, provenance, write_json
from benchmarks.families.measures import SHARE, failures, measure
from benchmarks.families.models import FAMILIES, MIXTURES


DOCUMENT = ROOT / "docs" / "families.md"
MARKS = "<!-- table -->", "<!-- end of table -->"


def row(name, result):
    family = FAMILIES.get(name) or MIXTURES[name]
    stays = ", ".join(f"`{weight.removesuffix('.weight').rpartition('*.')[2]}`" for weight in result["without"])
    return (
        name,
        f"`{family.model}`",
        f"{result['share']:.1%}",
        f"{result['reload']:.0e}" if result["reload"] else "0",
        f"{result['merge']:.0e}" if result["merge"] else "0",
        f"{result['export']:.0e}" if result["export"] else "0",
        stays + (f" ({family.note})" if family.note else ""),
    )


def table(results):
    header = ("family", "tried with", "in 4 bits", "reload", "merge", "export", "block weights that stay dense")
    return markdown_table(header, [row(name, result) for name, result in results.items()])


def write(results):
    before, rest = DOCUMENT.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    DOCUMENT.write_text(f"{before}{MARKS[0]}\n\n{table(results)}\n{provenance()}\n{MARKS[1]}{after}")
    write_json("families.json", {"results": results})


def main():
    known = FAMILIES | MIXTURES
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; nothing is written")
    parser.add_argument("--packed", action="store_true", help="a base in 4 bits from the start")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - known.keys())
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results, wrong = {}, {}
    for name in options.names or known:
        results[name] = measure(known[name], options.packed)
        wrong[name] = failures(results[name], SHARE if name in FAMILIES else 0.0)
        print(f"{name}: {'; '.join(wrong[name]) or 'as it must be'}", flush=True)
    print(table(results))
    if not options.names and not options.packed:
        write(results)
    sys.exit(any(wrong.values()))


if __name__ == "__main__":
    main()
