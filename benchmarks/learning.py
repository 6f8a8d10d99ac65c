"""Validation perplexity of LoQT, full-rank AdamW and LoRA after equal steps on equal batches.

    apt-get install bible-kjv          # Debian; brings bible-kjv-text, the King James Bible
    bible -f 'Gen1:1-Rev22:21' | sed 's/^[^ ]* //' > kjv.txt
    python benchmarks/learning.py --text kjv.txt --workers 2

Any other plain text will do. Each method is tried at four learning rates with seed 0, then its best learning rate
is repeated with the other seeds. A finished run is one line of results/learning.jsonl; a restart skips it. The table
is written to results/learning.md when all runs are there.

A variant of LoQT is run by overriding fields of its configuration under a name of its own:

    python benchmarks/learning.py --text kjv.txt --methods loqt --tag eigh --set projection=eigh --lrs 0.01 --seeds 0

All runs: the stock Trainer, fp32, AdamW without weight decay, gradients clipped at norm 1, 10% warm-up, cosine to
10% of the learning rate. The seed fixes the initial weights and the order of the batches, for all methods alike.
"""

import argparse
import ast
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path


# Two runs side by side on two cores are faster than one run on two threads at this size.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import (
    RESULTS,
    Blocks,
    llama,
    machine,
    markdown_table,
    pretraining_arguments,
    provenance,
    token_blocks,
    versions,
    write_markdown,
)
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Trainer


VOCABULARY, LENGTH, BATCH = 1024, 64, 16
RANK = 32
LEARNING_RATES = {
    "full": (0.001, 0.002, 0.003, 0.01),
    "loqt": (0.003, 0.005, 0.01, 0.02),
    "loqt-nq": (0.003, 0.005, 0.01, 0.02),
    "lora": (0.002, 0.003, 0.005, 0.01),
    "lora-fa": (0.003, 0.005, 0.01, 0.02),
}
NAMES = {
    "full": "full-rank AdamW",
    "loqt": "LoQT (NF4 W and P)",
    "loqt-nq": "LoQT-nq",
    "lora": "LoRA",
    "lora-fa": "LoRA, A frozen",
}


def prepare(method, model, overrides):
    """The model as the method trains it, and the callbacks it needs."""
    if method == "full":
        return model, []
    if method in ("lora", "lora-fa"):
        targets = [name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)]
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[f"model.{name}" for name in targets])
        adapted = get_peft_model(model, config)
        # LoQT trains everything that it does not target; LoRA gets the same, in place as well.
        for name, parameter in adapted.named_parameters():
            if not any(name.split("base_model.model.")[-1].startswith(f"model.{target}.") for target in targets):
                parameter.requires_grad = True
            elif method == "lora-fa" and "lora_A" in name:
                parameter.requires_grad = False
        return adapted, []
    from loqt_peft import LoQTConfig, LoQTTrainerCallback

    quantization = "nf4" if method == "loqt" else None
    fields = {
        "r": RANK,
        "loqt_alpha": 0.5,
        "full_rank_modules": "all",
        "quantize_weight": quantization,
        "quantize_projection": quantization,
        "update_interval": 100,
        "interval_growth": 1.2,
        "compensation_steps": 5,
    }
    return get_peft_model(model, LoQTConfig(**{**fields, **overrides})), [LoQTTrainerCallback()]


def train(spec, blocks):
    training, validation = blocks
    batch_order = torch.Generator().manual_seed(spec["seed"])
    order = torch.randperm(len(training), generator=batch_order)[: spec["steps"] * BATCH]
    model = llama(128, spec["layers"], 344, VOCABULARY, positions=LENGTH, seed=spec["seed"])
    targeted = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    model, callbacks = prepare(spec["method"], model, spec["overrides"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = pretraining_arguments(
            folder,
            spec["steps"],
            seed=spec["seed"],
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            learning_rate=spec["lr"],
            use_cpu=True,
            logging_strategy="no",
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Blocks(training[order]),
            eval_dataset=Blocks(validation[: len(validation) // 64 * 64]),
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        loss = trainer.evaluate()["eval_loss"]
    updates = [entry for entry in trainer.state.log_history if "loqt/updates" in entry]
    # A model no better than guessing uniformly has diverged, whatever its loss says.
    diverged = not math.isfinite(loss) or loss > math.log(VOCABULARY)
    return {
        **spec,
        "perplexity": math.exp(loss) if math.isfinite(loss) and loss < 100 else None,
        "diverged": diverged,
        "seconds": round(seconds, 1),
        "updates": len(updates),
        "last_update": updates[-1] if updates else None,
        "targeted_parameters": targeted,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "versions": versions(),
        "machine": machine(),
    }


def key(run):
    fields = ("method", "tag", "overrides", "lr", "seed", "steps", "layers")
    return json.dumps([run[field] for field in fields], sort_keys=True)


def finished(path):
    lines = path.read_text().splitlines() if path.exists() else []
    return {key(run): run for run in map(json.loads, lines)}


def initialise(blocks):
    global shared_blocks
    shared_blocks = blocks
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def train_here(spec):
    return train(spec, shared_blocks)


def run_all(specs, path, pool, start, counter):
    done = finished(path)
    missing = [spec for spec in specs if key(spec) not in done]
    futures = {pool.submit(train_here, spec): spec for spec in missing}
    for future in as_completed(futures):
        run = future.result()
        with path.open("a") as file:
            file.write(json.dumps(run) + "\n")
        counter["done"] += 1
        elapsed = time.perf_counter() - start
        left = elapsed / counter["done"] * (counter["all"] - counter["done"])
        figure = "diverged" if run["diverged"] else f"perplexity {run['perplexity']:.2f}"
        name = " ".join(filter(None, [run["method"], run["tag"]]))
        print(
            f"[{counter['done']}/{counter['all']}, about {left / 60:.0f} min left] {name} lr {run['lr']:g} "
            f"seed {run['seed']}: {figure}, {run['seconds']:.0f} s",
            flush=True,
        )
    done = finished(path)
    return [done[key(spec)] for spec in specs]


def best(runs):
    return min((run for run in runs if not run["diverged"]), key=lambda run: run["perplexity"])["lr"]


def table(runs, steps, layers):
    """Markdown of all finished runs of this length and depth: the methods at their best, then the grids."""
    runs = [run for run in runs if run["steps"] == steps and run["layers"] == layers]
    groups = {}
    for run in runs:
        groups.setdefault((run["method"], run["tag"]), []).append(run)
    summary, grid = [], []
    for (method, tag), group in sorted(groups.items(), key=lambda item: (item[0][1], list(NAMES).index(item[0][0]))):
        first_seed = [run for run in group if run["seed"] == min(r["seed"] for r in group)]
        if all(run["diverged"] for run in first_seed):
            continue
        lr = best(first_seed)
        at_best = [run for run in group if run["lr"] == lr]
        figures = [run["perplexity"] for run in at_best if not run["diverged"]]
        summary.append((method, tag, lr, statistics.mean(figures), figures, at_best))
        for run in sorted(first_seed, key=lambda run: run["lr"]):
            figure = "diverged" if run["diverged"] else f"{run['perplexity']:.2f}"
            grid.append((f"{NAMES[method]} {tag}".strip(), f"{run['lr']:g}", run["seed"], figure))
    full = next((mean for method, tag, _, mean, _, _ in summary if method == "full" and not tag), None)
    rows = []
    for method, tag, lr, mean, figures, at_best in summary:
        deviation = f" ± {statistics.stdev(figures):.2f}" if len(figures) > 1 else ""
        rows.append(
            (
                f"{NAMES[method]} {tag}".strip(),
                f"{lr:g}",
                f"{mean:.2f}{deviation}",
                ", ".join(f"{figure:.2f}" for figure in figures),
                f"{mean / full:.3f}" if full else "",
                at_best[0]["updates"],
                f"{statistics.mean(run['seconds'] for run in at_best):.0f}",
            )
        )
    header = ("method", "best lr", "validation perplexity", "by seed", "ratio to full rank", "updates", "seconds")
    targeted = runs[0]["targeted_parameters"]
    return "\n".join(
        [
            "# Learning\n",
            f"LLaMA, hidden 128, {layers} layers, {targeted:,} parameters in the targeted layers, vocabulary",
            f"{VOCABULARY}, {steps} steps of {BATCH} x {LENGTH} tokens, rank {RANK}. Mean ± standard deviation over",
            "seeds, each method at the best of its learning rates.\n",
            markdown_table(header, rows),
            "The learning rates tried:\n",
            markdown_table(("method", "lr", "seed", "validation perplexity"), grid),
            provenance(),
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a plain text file of a few megabytes")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--methods", nargs="+", choices=list(LEARNING_RATES), default=list(LEARNING_RATES))
    parser.add_argument("--lrs", nargs="+", type=float, help="instead of each method's own grid")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="the grid runs on the first")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--tag", default="", help="name of a variant; needed with --set")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of LoQTConfig")
    parser.add_argument("--results", type=Path, default=RESULTS / "learning.jsonl")
    options = parser.parse_args()
    if options.set and not options.tag:
        parser.error("--set needs --tag, or the variant could not be told from the method itself")
    overrides = {}
    for field, value in (item.split("=", 1) for item in options.set):
        try:
            overrides[field] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            overrides[field] = value

    def spec(method, lr, seed):
        names = {"method": method, "tag": options.tag, "overrides": overrides}
        return {**names, "lr": lr, "seed": seed, "steps": options.steps, "layers": options.layers}

    options.results.parent.mkdir(exist_ok=True)
    rates = {method: tuple(options.lrs or LEARNING_RATES[method]) for method in options.methods}
    first, *others = options.seeds
    grid = [spec(method, lr, first) for method in options.methods for lr in rates[method]]
    have = finished(options.results)
    counter = {"done": 0, "all": sum(key(s) not in have for s in grid) + len(options.methods) * len(others)}
    blocks = token_blocks(options.text, VOCABULARY, LENGTH)
    needed = options.steps * BATCH
    if len(blocks[0]) < needed:
        sys.exit(f"{options.text} gives {len(blocks[0])} blocks of {LENGTH} tokens, {needed} are needed")
    start = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, context, initializer=initialise, initargs=(blocks,)) as pool:
        runs = run_all(grid, options.results, pool, start, counter)
        repeats = []
        for method in options.methods:
            lr = best([run for run in runs if run["method"] == method])
            repeats += [spec(method, lr, seed) for seed in others]
        counter["all"] = counter["done"] + sum(key(s) not in finished(options.results) for s in repeats)
        run_all(repeats, options.results, pool, start, counter)
    text = table(finished(options.results).values(), options.steps, options.layers)
    if options.results.parent == RESULTS:
        write_markdown("learning.md", text)
    print("\n" + text)


if __name__ == "__main__":
    main()
