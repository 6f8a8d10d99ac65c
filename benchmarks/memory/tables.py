"""The results of predictions.py in Markdown: a function a section, which gives its lines."""

import json

from benchmarks.common import markdown_table, provenance
from benchmarks.memory.predictions import CLAIMS, COLUMNS, TABLE, UPDATES


GB = 10**9


def gb(size):
    return f"{size / GB:.2f}"


def closed_form(results):
    errors = [row["error"] for row in results["closed form"]]
    worst = {}
    for row in results["closed form"]:
        worst.setdefault(row["model"], []).append(row["error"])
    return [
        "# Memory\n",
        "GB are 10^9 bytes. Everything but the second table is **predicted**; no GPU was used.\n",
        "## Closed form against simulation\n",
        f"{len(errors)} settings: five methods, two optimizers, per-layer updates, checkpointing, accumulation, dtypes,",
        f"update modes. Largest error of the peak: {max(map(abs, errors)):.2%}. All of them: memory.json.\n",
        markdown_table(
            ("model", "settings", "largest error", "smallest error"),
            [(model, len(e), f"{max(e):+.2%}", f"{min(e):+.2%}") for model, e in worst.items()],
        ),
    ]


def real_steps(results):
    return [
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
    ]


def large_models(results):
    return [
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
    ]


def what_fits(results):
    return [
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
    ]


def updates(results):
    return [
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
    ]


def paper(results):
    return [
        "## The paper's figure for 1B\n",
        "Weights and optimizer states, rank 512, all in bf16 but what is quantized. The paper: 7.80 GB in full, 3.16 with",
        "LoQT (−59%), 5.11 with LoQT-nq, 4.38 with GaLore.\n",
        markdown_table(
            ("", "GB", "against full"),
            [(method, gb(row["bytes"]), f"{row['change']:+.1%}") for method, row in results["paper"].items()],
        ),
    ]


def growth(results):
    return [
        "## Growth\n",
        "Peak in GB of one sequence of 256 tokens with AdamW.\n",
        markdown_table(
            ("hidden", "layers", "rank", "full", "LoQT", "LoQT, simulated"),
            [
                (r["hidden"], r["layers"], r["rank"], gb(r["full"]), gb(r["loqt"]), gb(r["loqt, simulation"]))
                for r in results["growth"]
            ],
        ),
    ]


SECTIONS = (closed_form, real_steps, large_models, what_fits, updates, paper, growth)


def markdown(results):
    return "\n".join([*(line for section in SECTIONS for line in section(results)), provenance()])
