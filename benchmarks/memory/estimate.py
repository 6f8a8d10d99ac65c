"""Memory predicted in closed form, by simulation, and counted in real steps on the CPU.

    python -m benchmarks.memory.estimate

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
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")
# the profiler announces every start and stop
os.environ.setdefault("KINETO_LOG_LEVEL", "5")

from transformers import LlamaConfig, MistralConfig, Qwen2Config

from benchmarks.common import RESULTS, markdown_table, provenance, write_json, write_markdown
from loqt_peft import estimate_memory
from loqt_peft.closed_form import ClosedForm, MemoryOptions, ModelShape, load_config
from loqt_peft.simulation import measure_on_cpu, simulate


ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "examples" / "pretraining" / "configs"
GB = 10**9
ORDINARY = ("forward", "backward", "optimizer")


def models():
    common = {"tie_word_embeddings": False}
    return {
        "LLaMA 256 x 4": LlamaConfig(
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            vocab_size=1000,
            **common,
        ),
        "LLaMA 2048 x 2": LlamaConfig(
            hidden_size=2048,
            intermediate_size=5461,
            num_hidden_layers=2,
            num_attention_heads=32,
            vocab_size=32000,
            **common,
        ),
        "Qwen2 1024 x 6, tied, GQA": Qwen2Config(
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=6,
            num_attention_heads=16,
            num_key_value_heads=4,
            vocab_size=8000,
            tie_word_embeddings=True,
        ),
        "Mistral 4096 x 8, GQA": MistralConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=8,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=32000,
            **common,
        ),
        "LLaMA-7B": load_config(CONFIGS / "llama_7b.json")[0],
    }


def grid(width):
    """Options for a model of hidden size `width`."""
    r = width // 8
    rows = []
    for method in ("loqt", "loqt-nq", "lora", "qlora", "full"):
        base = {"method": method, "rank": 16 if "lora" in method else r}
        double_quant = method in ("loqt", "qlora")
        rows += [
            base,
            {**base, "per_layer": True, "optimizer": "adamw_8bit"},
            {**base, "gradient_checkpointing": True, "sequence_length": 512, "batch_size": 2},
            {**base, "gradient_accumulation_steps": 4, "optimizer": "adamw_8bit", "double_quant": double_quant},
        ]
    loqt = {"method": "loqt", "rank": r}
    rows += [
        {**loqt, "update_mode": mode, "optimizer": "adamw_8bit", "gradient_accumulation_steps": steps}
        for mode in ("stagger", "whole")
        for steps in (1, 2)
    ]
    return rows + [
        {**loqt, "adapter_dtype": "float32"},
        {**loqt, "method": "qlora", "rank": 16, "adapter_dtype": "float32"},
        {**loqt, "dtype": "float32"},
        {"method": "full", "dtype": "float32", "per_layer": True},
        {**loqt, "base": "dense"},
        {**loqt, "full_rank": False, "batch_size": 4},
        {**loqt, "optimizer": "paged_adamw", "gradient_checkpointing": True, "per_layer": True, "batch_size": 4},
        {**loqt, "update_mode": "whole", "offload_gradients": True},
        {**loqt, "method": "loqt-nq", "rank": r + r // 4, "per_layer": True},
    ]


def compare_closed_form():
    rows = []
    for name, config in models().items():
        for options in grid(config.hidden_size):
            chosen = MemoryOptions(**options)
            form = ClosedForm(ModelShape.from_config(config, name), chosen).phases()
            predicted = {phase: sum(held.values()) for phase, held in form.items()}
            simulated = {phase: peak.total for phase, peak in simulate(config, chosen).items()}
            error = max(predicted.values()) / max(simulated.values()) - 1
            rows.append(
                {"model": name, "options": options, "closed form": predicted, "simulation": simulated, "error": error}
            )
            print(f"{name} {options}: {error:+.2%}", flush=True)
    return rows


def compare_real():
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=2000,
        tie_word_embeddings=False,
    )
    rows = []
    for options in (
        {"method": "full"},
        {"method": "lora", "rank": 16},
        {"method": "qlora", "rank": 16, "gradient_accumulation_steps": 2},
        {"method": "loqt", "rank": 64},
        {"method": "loqt", "rank": 64, "per_layer": True, "gradient_checkpointing": True},
        {"method": "loqt", "rank": 64, "update_mode": "whole", "full_rank": False},
        {"method": "loqt-nq", "rank": 64, "double_quant": True},
    ):
        chosen = MemoryOptions(dtype="float32", batch_size=4, sequence_length=64, **options)
        simulated = simulate(config, chosen, all_layers=True)
        measured = measure_on_cpu(config, chosen)
        row = {"options": options}
        for step, phases in (("ordinary", ORDINARY), ("update step", ("update step",))):
            if step in measured:
                peak = max(simulated[phase].total for phase in phases)
                row[step] = {"simulation": peak, "measured": measured[step], "error": peak / measured[step] - 1}
        rows.append(row)
        print(row, flush=True)
    return rows


LARGE = {"rank": 1024, "optimizer": "adamw_8bit", "double_quant": True}
TABLE = {
    "full AdamW": {"method": "full", "optimizer": "adamw"},
    "QLoRA r 16": {**LARGE, "method": "qlora", "rank": 16},
    "GaLore, per-layer": {**LARGE, "method": "galore", "double_quant": False, "per_layer": True},
    "LoQT": LARGE,
    "LoQT, per-layer": {**LARGE, "per_layer": True},
    "LoQT, per-layer, checkpointing": {**LARGE, "per_layer": True, "gradient_checkpointing": True},
}
COLUMNS = {"7B, 256 tokens": ("7b", 256), "7B, 1280 tokens": ("7b", 1280), "13B, 256 tokens": ("13b", 256)}


def estimate(size, simulated=False, **options):
    return estimate_memory(CONFIGS / f"llama_{size}.json", simulate=simulated, **options)


def large_models():
    rows = []
    for method, options in TABLE.items():
        for column, (size, length) in COLUMNS.items():
            form = estimate(size, sequence_length=length, **options)
            row = {"method": method, "column": column, "closed form": form.peak, "decided by": form.peak_phase}
            if options.get("method") != "galore":
                row["simulation"] = estimate(size, True, sequence_length=length, **options).peak
            rows.append(row)
            print(row, flush=True)
    return rows


CLAIMS = {
    "LLaMA-7B, 1280 tokens, under 24 GiB, no per-layer updates": ("7b", "24GiB", {**LARGE, "sequence_length": 1280}),
    "LLaMA-13B, 256 tokens, under 24 GiB, per-layer updates": ("13b", "24GiB", {**LARGE, "per_layer": True}),
    "LLaMA-7B, 256 tokens, under 16 GiB": ("7b", "16GiB", {**LARGE, "per_layer": True}),
}


def claims():
    rows = []
    for claim, (size, budget, options) in CLAIMS.items():
        found = estimate(size, True, all_layers=True, budget=budget, **options)
        # not where this checkout happens to lie
        model = Path(found.model).relative_to(ROOT).as_posix()
        rows.append({"claim": claim, **found.to_dict(), "model": model})
        print(claim, found.peak, found.required, found.fits, flush=True)
    return rows


UPDATES = {
    "7B, 256 tokens": ("7b", LARGE),
    "7B, 1280 tokens": ("7b", {**LARGE, "sequence_length": 1280}),
    "7B, 1280 tokens, checkpointing": ("7b", {**LARGE, "sequence_length": 1280, "gradient_checkpointing": True}),
    "13B, 256 tokens": ("13b", LARGE),
    "13B, 256 tokens, per-layer": ("13b", {**LARGE, "per_layer": True}),
    "13B, 256 tokens, per-layer, checkpointing": (
        "13b",
        {**LARGE, "per_layer": True, "gradient_checkpointing": True},
    ),
}


def updates():
    rows = []
    for setting, (size, options) in UPDATES.items():
        for mode in ("backward", "stagger", "whole"):
            for steps in (1, 4):
                found = estimate(size, True, update_mode=mode, gradient_accumulation_steps=steps, **options)
                rows.append(
                    {
                        "setting": setting,
                        "update_mode": mode,
                        "gradient_accumulation_steps": steps,
                        "ordinary": max(sum(found.phases[phase].values()) for phase in ORDINARY),
                        "update": sum(found.phases["update step"].values()),
                        "ratio": found.update_ratio,
                        "host": sum(found.host.values()),
                    }
                )
                print(rows[-1], flush=True)
    return rows


def updates_on_cpu():
    """Real steps of a LLaMA on the CPU, where what is offloaded lies in the memory that is counted."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=1000,
        tie_word_embeddings=False,
    )
    rows = []
    for mode in ("backward", "stagger", "whole"):
        for steps in (1, 4):
            options = MemoryOptions(
                method="loqt",
                rank=128,
                dtype="float32",
                optimizer="adamw",
                batch_size=4,
                sequence_length=256,
                update_mode=mode,
                gradient_accumulation_steps=steps,
            )
            measured = measure_on_cpu(config, options)
            ratio = measured["update step"] / measured["ordinary"]
            rows.append({"update_mode": mode, "gradient_accumulation_steps": steps, **measured, "ratio": ratio})
            print(rows[-1], flush=True)
    return rows


def paper():
    """Weights and optimizer states at 1B, which the paper gives as 7.80 and 3.16 GB."""
    held = {
        method: sum(
            ClosedForm(
                ModelShape.from_config(*load_config(CONFIGS / "llama_1b.json")),
                MemoryOptions(method=method, rank=512),
            )
            .static()
            .values()
        )
        for method in ("full", "loqt", "loqt-nq", "galore")
    }
    return {method: {"bytes": size, "change": size / held["full"] - 1} for method, size in held.items()}


def growth():
    base = {"hidden": 2048, "layers": 24, "rank": 512}
    rows = []
    for name, values in {"hidden": (1024, 2048, 4096), "layers": (12, 24, 48), "rank": (128, 256, 512)}.items():
        for value in values:
            sizes = {**base, name: value}
            hidden = sizes["hidden"]
            config = LlamaConfig(
                hidden_size=hidden,
                intermediate_size=hidden * 8 // 3,
                num_hidden_layers=sizes["layers"],
                num_attention_heads=hidden // 64,
                vocab_size=32000,
                tie_word_embeddings=False,
            )
            row = {"varied": name, **sizes}
            for method in ("full", "loqt"):
                row[method] = estimate_memory(config, method=method, rank=sizes["rank"]).peak
            row["loqt, simulation"] = estimate_memory(config, simulate=True, rank=sizes["rank"]).peak
            rows.append(row)
            print(row, flush=True)
    return rows


PARTS = {
    "closed form": compare_closed_form,
    "real": compare_real,
    "large": large_models,
    "claims": claims,
    "updates": updates,
    "updates on the CPU": updates_on_cpu,
    "paper": paper,
    "growth": growth,
}


def gb(size):
    return f"{size / GB:.2f}"


def markdown(results):
    errors = [row["error"] for row in results["closed form"]]
    worst = {}
    for row in results["closed form"]:
        worst.setdefault(row["model"], []).append(row["error"])
    sections = [
        "# Memory\n",
        "GB are 10^9 bytes. Everything but the second table is **predicted**; no GPU was used.\n",
        "## Closed form against simulation\n",
        f"{len(errors)} settings: five methods, two optimizers, per-layer updates, checkpointing, accumulation, dtypes,",
        f"update modes. Largest error of the peak: {max(map(abs, errors)):.2%}. All of them: memory.json.\n",
        markdown_table(
            ("model", "settings", "largest error", "smallest error"),
            [(model, len(e), f"{max(e):+.2%}", f"{min(e):+.2%}") for model, e in worst.items()],
        ),
        "## Simulation against real steps\n",
        "A small LLaMA (hidden 256, 3 layers) in float32 with torch's AdamW on the CPU, counted by the events of its",
        "allocator.\n",
        markdown_table(
            ("options", "step", "simulated, bytes", "measured, bytes", "error"),
            [
                (
                    json.dumps(row["options"]),
                    step,
                    row[step]["simulation"],
                    row[step]["measured"],
                    f"{row[step]['error']:+.5%}",
                )
                for row in results["real"]
                for step in ("ordinary", "update step")
                if step in row
            ],
        ),
        "## LLaMA-7B and -13B: peak in GB\n",
        "Closed form / simulation. bf16, rank 1024, 8-bit AdamW, double quantization unless said, one sequence, update step",
        "included. GaLore's optimizer is not simulated.\n",
        markdown_table(
            ("", *COLUMNS),
            [
                (
                    method,
                    *(
                        f"{gb(row['closed form'])} / {gb(row['simulation']) if 'simulation' in row else '–'}"
                        for row in results["large"]
                        if row["method"] == method
                    ),
                )
                for method in TABLE
            ],
        ),
        "## What fits\n",
        "Every layer simulated. Required: the peak, 5% for the allocator and 512 MiB for the CUDA context, both assumed.\n",
        markdown_table(
            ("", "options", "peak", "decided by", "required", "budget", "fits"),
            [
                (
                    row["claim"],
                    json.dumps(CLAIMS[row["claim"]][2]),
                    gb(row["peak_bytes"]),
                    row["peak_phase"],
                    gb(row["required_bytes"]),
                    gb(row["budget_bytes"]),
                    "yes" if row["fits"] else "no",
                )
                for row in results["claims"]
            ],
        ),
        "## Update step against ordinary step\n",
        "Simulated, rank 1024, 8-bit AdamW, double quantization, in GB on the device; in brackets with 4 micro-batches a",
        "step.\n",
        markdown_table(
            ("", "update mode", "ordinary", "update", "ratio", "host"),
            [
                (
                    setting,
                    mode,
                    *(f"{gb(one[key])} ({gb(four[key])})" for key in ("ordinary", "update")),
                    f"{one['ratio']:.3f} ({four['ratio']:.3f})",
                    f"{gb(one['host'])} ({gb(four['host'])})",
                )
                for setting in UPDATES
                for mode in ("backward", "stagger", "whole")
                for one, four in [
                    [r for r in results["updates"] if (r["setting"], r["update_mode"]) == (setting, mode)]
                ]
            ],
        ),
        "Counted by the allocator's events in real steps on the CPU (hidden 512, 8 layers, rank 128, 4 x 256 tokens, float32,",
        "torch's AdamW), where what goes to the host lies in the memory that is counted; in brackets with 4 micro-batches:\n",
        markdown_table(
            ("update mode", "ordinary", "update", "ratio"),
            [
                (
                    mode,
                    *(f"{gb(one[key])} ({gb(four[key])})" for key in ("ordinary", "update step")),
                    f"{one['ratio']:.3f} ({four['ratio']:.3f})",
                )
                for mode in ("backward", "stagger", "whole")
                for one, four in [[r for r in results["updates on the CPU"] if r["update_mode"] == mode]]
            ],
        ),
        "## The paper's figure for 1B\n",
        "Weights and optimizer states, rank 512, all in bf16 but what is quantized. The paper: 7.80 GB in full, 3.16 with",
        "LoQT (−59%), 5.11 with LoQT-nq, 4.38 with GaLore.\n",
        markdown_table(
            ("", "GB", "against full"),
            [(method, gb(row["bytes"]), f"{row['change']:+.1%}") for method, row in results["paper"].items()],
        ),
        "## Growth\n",
        "Peak in GB of one sequence of 256 tokens with AdamW.\n",
        markdown_table(
            ("hidden", "layers", "rank", "full", "LoQT", "LoQT, simulated"),
            [
                (r["hidden"], r["layers"], r["rank"], gb(r["full"]), gb(r["loqt"]), gb(r["loqt, simulation"]))
                for r in results["growth"]
            ],
        ),
        provenance(),
    ]
    return "\n".join(sections)


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
