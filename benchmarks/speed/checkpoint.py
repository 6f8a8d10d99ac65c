"""What the seals of a saved adapter cost: their share of saving and of loading it.

    python -m benchmarks.speed.checkpoint

A LLaMA of the paper's sizes with random weights, after one update, is saved and loaded several times in turn. Written to
results/checkpoint.json and results/checkpoint.md.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.common import CONFIGS, RESULTS, machine, markdown_table, provenance, versions, write_markdown
from loqt_peft import LoQTConfig, loading
from loqt_peft import model as loqt_model


class Clock:
    """Adds up the seconds that a function takes when a module of loqt_peft calls it."""

    def __init__(self, module, name):
        self.function, self.seconds = getattr(module, name), 0.0
        setattr(module, name, self)

    def __call__(self, *args, **kwargs):
        start = time.perf_counter()
        result = self.function(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return result


def base_model(size):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(CONFIGS / f"llama_{size}.json"))


def measure(size, rank, full_rank_modules, repeats):
    config = LoQTConfig(task_type="CAUSAL_LM", r=rank, full_rank_modules=full_rank_modules)
    model = get_peft_model(base_model(size), config)
    model.train()
    tokens = torch.randint(0, model.config.vocab_size, (1, 32))
    model.begin_step(0)
    model(input_ids=tokens, labels=tokens).loss.backward()
    model.end_step()
    seal, verify = Clock(loqt_model, "seal_adapter"), Clock(loading, "verify_adapter")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            seal.seconds = verify.seconds = 0.0
            start = time.perf_counter()
            model.save_pretrained(folder)
            saved = time.perf_counter() - start
            base = base_model(size)
            start = time.perf_counter()
            PeftModel.from_pretrained(base, folder)
            loaded = time.perf_counter() - start
            rows.append({"save": saved, "seal": seal.seconds, "load": loaded, "verify": verify.seconds})
        megabytes = (Path(folder) / "adapter_model.safetensors").stat().st_size / 1e6
    medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    return {"size": size, "rank": rank, "full_rank_modules": full_rank_modules, "megabytes": megabytes, **medians}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="130m", help="of examples/pretraining/configs")
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    results = [measure(options.size, options.rank, modules, options.repeats) for modules in (None, "all")]
    record = {"results": results, "machine": machine(), "versions": versions()}
    (RESULTS / "checkpoint.json").write_text(json.dumps(record, indent=2) + "\n")
    rows = [
        (
            f"LLaMA {r['size']}, r {r['rank']}" + (", full-rank modules" if r["full_rank_modules"] else ""),
            f"{r['megabytes']:.0f}",
            f"{r['save']:.2f}",
            f"{r['seal']:.2f}",
            f"{r['load']:.2f}",
            f"{r['verify']:.2f}",
            f"{1000 * r['verify'] / r['megabytes']:.1f}",
        )
        for r in results
    ]
    header = ("adapter", "MB", "save s", "of it seals s", "load s", "of it verifying s", "verifying ms per MB")
    text = "\n".join(
        [
            "# Seals of a saved adapter\n",
            f"After one update, fp32 base, medians of {options.repeats}, one thread.\n",
            markdown_table(header, rows),
            provenance(),
        ]
    )
    write_markdown("checkpoint.md", text)
    print(text)


if __name__ == "__main__":
    main()
