"""What is predicted of memory, and counted in real steps on the CPU; each part gives the rows of a table."""

from pathlib import Path

from transformers import LlamaConfig, MistralConfig, Qwen2Config

from benchmarks.common import CONFIGS, ROOT
from loqt_peft import estimate_memory
from loqt_peft.memory.closed_form import ClosedForm
from loqt_peft.memory.options import MemoryOptions
from loqt_peft.memory.shape import ModelShape, load_config
from loqt_peft.memory.simulation import measure_on_cpu, simulate


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
