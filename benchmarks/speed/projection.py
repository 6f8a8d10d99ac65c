"""The ways to get P from a gradient: what each costs, and what it keeps of real gradients.

    python -m benchmarks.speed.projection --text kjv.txt      # the text: ../README.md

Cost: matrices of the shapes of LLaMA's attention (n x n) and MLP (2.7n x n), with a decaying spectrum, at ranks n/4
and n/16, one thread. Quality: gradients of a LLaMA's linear layers at
its first step and after 100 steps of full-rank AdamW on the text, at ranks d/4 and d/16: the share of ‖G‖² that P
keeps, and the overlap of its subspace with that of the exact singular vectors, ‖P P_svdᵀ‖² / r. Beside the ways that
`LoQTConfig.projection` offers stand two that need less of the gradient, and are not offered: a one-pass sketch, which
could be summed over micro-batches without forming G, and the gradient of one of four micro-batches.

Results: results/projection.json and results/projection.md.
"""

import argparse
import os
import statistics
import time
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks.common import llama, markdown_table, provenance, token_blocks, write_json, write_markdown
from loqt_peft.algorithm.projection import project, random_projection


METHODS = ("svd", "eigh", "randomized", "random", "sketch", "one micro-batch of 4")
SKETCH_EXTRA = 8
COSTS = (
    ("svd", "svd", 4),
    ("eigh", "eigh", 4),
    ("randomized, r = n/4", "randomized", 4),
    ("randomized, r = n/16", "randomized", 16),
)
VOCABULARY, LENGTH, BATCH = 1024, 64, 32


def seconds(rows, columns, rank, method, repeats):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(rows, columns, generator=generator) * torch.arange(1, columns + 1) ** -0.5
    matrix = matrix @ torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    taken = []
    for _ in range(repeats):
        # processor time: what else runs on the machine does not count
        start = time.process_time()
        project(matrix, rank, method)
        taken.append(time.process_time() - start)
    return min(taken)


def gradients(blocks, hidden, layers, steps, wanted):
    """Of all linear layers but the head, at the wanted steps of a short full-rank run: the gradient, and that of a quarter
    of the batch."""
    model = llama(hidden, layers, hidden * 43 // 16, VOCABULARY, positions=LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    linears = {name: m for name, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)}
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))
    found = {}
    for step in range(steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / (steps / 10))
        tokens = blocks[order[step * BATCH : (step + 1) * BATCH]]
        if step in wanted:
            model(input_ids=tokens[: BATCH // 4], labels=tokens[: BATCH // 4]).loss.backward()
            parts = {name: m.weight.grad for name, m in linears.items()}
            model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        if step in wanted:
            found[step] = {name: (m.weight.grad.clone(), parts[name]) for name, m in linears.items()}
            print(f"gradients of step {step} taken", flush=True)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return found


def sketch(gradient, rank):
    """P from Ω G, of which each micro-batch could bring its part, [rank, in], or G Ω."""
    narrow = gradient.shape[1] <= gradient.shape[0]
    G = gradient if narrow else gradient.T
    generator = torch.Generator().manual_seed(0)
    thin = torch.randn(rank + SKETCH_EXTRA, G.shape[0], generator=generator) @ G
    rows = torch.linalg.svd(thin, full_matrices=False).Vh[:rank]
    return rows if narrow else rows.T


def quality(gradient, part, rank, method):
    """Share of the gradient's energy that P keeps, and the overlap with the exact subspace."""
    narrow = gradient.shape[1] <= gradient.shape[0]
    if method == "sketch":
        rows = sketch(gradient, rank)
    elif method == "one micro-batch of 4":
        rows = project(part, rank, "svd")
    elif method == "random":
        rows = random_projection(gradient.shape, rank, seed=0)
    else:
        rows = project(gradient, rank, method)
    exact = project(gradient, rank, "svd")
    # P spans rows of G where the input side is the smaller one, columns otherwise; below, always rows.
    rows, exact, gradient = (rows, exact, gradient) if narrow else (rows.T, exact.T, gradient.T)
    kept = (gradient @ rows.T).square().sum() / gradient.square().sum()
    return kept.item(), ((rows @ exact.T).square().sum() / rank).item()


def measure_costs(options):
    costs = []
    for rows, columns in [(rows, n) for n in options.sizes for rows in (n, n * 43 // 16)]:
        cost = {"shape": f"{rows} x {columns}"}
        # Only the randomized method costs less at a smaller rank.
        for name, method, divisor in COSTS:
            cost[name] = seconds(rows, columns, columns // divisor, method, options.repeats)
        costs.append(cost)
        print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in cost.items()), flush=True)
    return costs


def measure_quality(options):
    blocks, _ = token_blocks(options.text, VOCABULARY, LENGTH)
    kept = []
    for step, layers in gradients(blocks, options.hidden, options.layers, options.steps, (0, options.steps)).items():
        for divisor in (4, 16):
            for method in METHODS:
                figures = [quality(g, part, options.hidden // divisor, method) for g, part in layers.values()]
                energies, overlaps = zip(*figures, strict=True)
                kept.append(
                    {
                        "step": step,
                        "rank": f"d/{divisor}",
                        "method": method,
                        "energy": statistics.mean(energies),
                        "lowest_energy": min(energies),
                        "overlap": statistics.mean(overlaps),
                        "lowest_overlap": min(overlaps),
                    }
                )
    return kept


def markdown(options, costs, kept):
    cost_rows = [[c["shape"]] + [f"{c[name]:.3f}" for name, _, _ in COSTS] for c in costs]
    quality_rows = [
        (q["step"], q["rank"], q["method"])
        + tuple(f"{q[name]:.4f}" for name in ("energy", "lowest_energy", "overlap", "lowest_overlap"))
        for q in kept
    ]
    return "\n".join(
        [
            "# Projection\n",
            f"Processor seconds on one thread, the best of {options.repeats}:\n",
            markdown_table(("shape", *(name for name, _, _ in COSTS)), cost_rows),
            f"Gradients of a LLaMA with hidden {options.hidden} and {options.layers} layers, {BATCH * LENGTH} tokens;",
            "mean and lowest over its linear layers:\n",
            markdown_table(
                ("step", "rank", "method", "energy kept", "lowest", "overlap with exact", "lowest"), quality_rows
            ),
            provenance(),
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a plain text file of a few megabytes")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    costs, kept = measure_costs(options), measure_quality(options)
    write_json(
        "projection.json",
        {"options": {**vars(options), "text": Path(options.text).name}, "seconds": costs, "quality": kept},
    )
    text = markdown(options, costs, kept)
    write_markdown("projection.md", text)
    print("\n" + text)


if __name__ == "__main__":
    main()
