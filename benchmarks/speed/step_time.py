"""Seconds of a training step with LoQT against PEFT's LoRA at the same rank and full-rank AdamW, and of a LoQT update.

    python benchmarks/step_time.py

Copies of one LLaMA are trained on the same tokens in one process, in turns, on one thread: LoRA and LoQT first both
over a base in 4 bits (bitsandbytes NF4), then both over a dense one, training only the adapters; beside them all
parameters of the dense model with AdamW. The medians are over pairs of neighbouring steps, so that a machine that slows
down for a while slows both. Seconds are given by the clock on the wall, and as processor time, which leaves out what
else runs on the machine. Ordinary steps of LoQT are counted after its first update, when its weights are the packed
ones. An update is counted twice: merging and requantizing alone (`end_step`), and all that the update step costs beyond
an ordinary one, which adds the gradients of the weights and their projections.

Results: results/step_time.json and results/step_time.md.
"""

import argparse
import os
import statistics
import tempfile
import time


os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.common import llama, markdown_table, provenance, write_json, write_markdown
from loqt_peft import LoQTConfig


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base(kind, options):
    model = llama(options.hidden, options.layers, options.intermediate, options.vocabulary, heads=8)
    if kind == "dense":
        return model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)


class Run:
    """One method with its optimizer and its tokens."""

    def __init__(self, model, tokens):
        self.model, self.tokens, self.steps = model, tokens, 0
        self.loqt = hasattr(model, "begin_step")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.trained = sum(parameter.numel() for parameter in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3)
        model.train()

    def step(self):
        """Seconds of a step and of the update in it, each [wall, processor], and whether it was an update step."""
        start = now()
        captured = self.model.begin_step(self.steps, lambda: True) if self.loqt else False
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.optimizer.step()
        stepped = now()
        if self.loqt:
            self.model.end_step(self.optimizer)
        switched = now()
        self.optimizer.zero_grad()
        self.steps += 1
        return now() - start, switched - stepped, captured


def now():
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def measure(kind, options):
    tokens = torch.randint(options.vocabulary, (options.batch, options.length))
    lora_config = LoraConfig(r=options.rank, lora_alpha=options.rank, lora_dropout=0.0, target_modules=TARGETS)
    loqt_config = LoQTConfig(
        r=options.rank,
        target_modules=TARGETS,
        update_interval=options.pairs + 1,
        interval_schedule="constant",
        **({"projection": options.projection} if options.projection else {}),
    )
    lora = Run(get_peft_model(base(kind, options), lora_config), tokens)
    loqt = Run(get_peft_model(base(kind, options), loqt_config), tokens)
    full = Run(base("dense", options), tokens)
    pairs, updates, full_steps = [], [], []
    ordinary_seconds = None
    total = options.updates * (options.pairs + 1)
    for step in range(total):
        # The order alternates: what runs first in a pair must not profit from it.
        if step % 2:
            loqt_seconds, update_seconds, captured = loqt.step()
            lora_seconds, _, _ = lora.step()
        else:
            lora_seconds, _, _ = lora.step()
            loqt_seconds, update_seconds, captured = loqt.step()
        full_seconds, _, _ = full.step()
        print(f"{kind} step {step + 1}/{total}: full {full_seconds[0]:.2f} s, LoRA {lora_seconds[0]:.2f} s, ", end="")
        print(f"LoQT {loqt_seconds[0]:.2f} s", end="")
        print(f", of it the update {update_seconds[0]:.2f} s" if captured else "", flush=True)
        # The first steps of a process also pay for allocations; the update of step 0 comes again later.
        if captured and step:
            updates.append((loqt_seconds, update_seconds, ordinary_seconds))
        elif step > 1:
            pairs.append((lora_seconds, loqt_seconds))
            full_steps.append(full_seconds)
        if not captured:
            ordinary_seconds = loqt_seconds
    result = {
        "trained_parameters": {"lora": lora.trained, "loqt": loqt.trained},
        "pairs": len(pairs),
        "updates": len(updates),
        "projection": loqt_config.projection,
    }
    for i, clock in enumerate(("wall", "processor")):
        ordinary = statistics.median(seconds[i].item() for _, seconds in pairs)
        ratios = sorted((second / first)[i].item() for first, second in pairs)
        update = statistics.median(switch[i].item() for _, switch, _ in updates)
        # against the step before: the machine's speed drifts
        shares = [(switch / before)[i].item() for _, switch, before in updates]
        extras = sorted((whole / before)[i].item() - 1 for whole, _, before in updates)
        of_full = [(own / whole)[i].item() for (_, own), whole in zip(pairs, full_steps, strict=True)]
        result[clock] = {
            "lora_step_seconds": statistics.median(seconds[i].item() for seconds, _ in pairs),
            "loqt_step_seconds": ordinary,
            "step_ratio": statistics.median(ratios),
            "step_ratio_quartiles": [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]],
            "full_step_seconds": statistics.median(seconds[i].item() for seconds in full_steps),
            "ratio_to_full": statistics.median(of_full),
            "update_seconds": update,
            "update_in_steps": statistics.median(shares),
            "update_step_extra_in_steps": statistics.median(extras),
            "update_step_extra_extremes": [extras[0], extras[-1]],
        }
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1376)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=2, help="ordinary steps between two updates")
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--projection", help="instead of the default of LoQTConfig")
    parser.add_argument("--bases", nargs="+", default=["4-bit", "dense"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {kind: measure(kind, options) for kind in options.bases}
    first = next(iter(results.values()))
    write_json("step_time.json", {"options": vars(options), "results": results})
    rows = [
        (
            kind,
            clock,
            f"{r['lora_step_seconds']:.2f}",
            f"{r['loqt_step_seconds']:.2f}",
            f"{r['step_ratio']:.3f} ({r['step_ratio_quartiles'][0]:.3f} to {r['step_ratio_quartiles'][1]:.3f})",
            f"{r['full_step_seconds']:.2f}",
            f"{r['ratio_to_full']:.3f}",
            f"{r['update_seconds']:.2f}",
            f"{r['update_in_steps']:.2f}",
            "{:.2f} ({:.2f} to {:.2f})".format(r["update_step_extra_in_steps"], *r["update_step_extra_extremes"]),
        )
        for kind, result in results.items()
        for clock, r in ((clock, result[clock]) for clock in ("wall", "processor"))
    ]
    header = (
        "base",
        "clock",
        "LoRA step, s",
        "LoQT step, s",
        "ratio, median (quartiles)",
        "full-rank AdamW step, s",
        "LoQT / full rank",
        "update, s",
        "update, in steps",
        "update with the capture of gradients, in steps, median (extremes)",
    )
    text = "\n".join(
        [
            "# Step time\n",
            f"LLaMA, hidden {options.hidden}, MLP {options.intermediate}, {options.layers} layers, rank",
            f"{options.rank}, {options.batch * options.length} tokens a step, fp32, one thread.",
            f"{first['pairs']} pairs of ordinary steps and {first['updates']} updates for each base, projection",
            f'"{first["projection"]}". Updates are counted in the ordinary step before them.\n',
            markdown_table(header, rows),
            provenance(),
        ]
    )
    write_markdown("step_time.md", text)
    print("\n" + text)


if __name__ == "__main__":
    main()
