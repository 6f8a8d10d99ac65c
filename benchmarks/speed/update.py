"""What the update of one layer costs, against the exact algorithm.

    python -m benchmarks.speed.update

The update of one layer of n x n weights at ranks n/4 and n/16, with the defaults of LoQTConfig, against the same
update with an exact SVD, bitsandbytes' quantization and one SVD-based pseudo-inverse (Algorithms 1 and 2 as they are
printed). Both in turns, in one process, on one thread, as processor time; ratios are medians over the turns.

Results: results/update.json and results/update.md.
"""

import argparse
import os
import statistics
import time


os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import get_peft_model

from benchmarks.common import markdown_table, provenance, write_json, write_markdown
from loqt_peft import LoQTConfig
from loqt_peft.training.switching import compute_switch, project_gradient, write_switch


STEPS = 5


def quantized(X):
    codes, state = quantize_4bit(X.contiguous(), blocksize=64, quant_type="nf4")
    return dequantize_4bit(codes, state)


def exact_update(W, B, P, G, scale, rank):
    """Algorithms 1 and 2 on dense float32 matrices, n x n; the error that it leaves."""
    W = W + scale * B @ P
    P = quantized(torch.linalg.svd(G, full_matrices=False).Vh[:rank])
    inverse = torch.linalg.pinv(P)
    Q, B = quantized(W), torch.zeros_like(B)
    best = torch.linalg.norm(W - Q)
    for _ in range(STEPS):
        Q = quantized(W - scale * B @ P)
        B = (W - Q) @ inverse / scale
        best = min(best, torch.linalg.norm(W - Q - scale * B @ P))
    return best / torch.linalg.norm(W)


def cost(n, rank, turns):
    torch.manual_seed(0)
    linear = torch.nn.Linear(n, n, bias=False)
    config = LoQTConfig(r=rank, target_modules=["0"], compensation_steps=STEPS)
    model = get_peft_model(torch.nn.Sequential(linear), config)
    layer = model.base_model.model[0]
    spectrum = torch.arange(1, n + 1) ** -0.5
    figures = {"exact": [], "ours": [], "exact error": [], "error": []}
    for _ in range(turns):
        G = torch.randn(n, n) * spectrum @ torch.linalg.qr(torch.randn(n, n)).Q
        W = (
            linear.weight.detach()
            if not layer.num_updates("default")
            else layer.weight_format("default").unpack(layer.loqt_weight["default"])
        )
        B, P = layer.loqt_B["default"].detach().clone(), layer.projection("default")
        gradient = G.clone()
        start = time.process_time()
        exact_error = exact_update(W, B, P, G, layer.scaling["default"], rank)
        middle = time.process_time()
        projected = project_gradient(layer, "default", gradient)
        switch = compute_switch(layer, "default", projected)
        write_switch(layer, "default", switch)
        figures["exact"].append(middle - start)
        figures["ours"].append(time.process_time() - middle)
        figures["exact error"].append(exact_error.item())
        figures["error"].append((switch.statistics[3] / switch.statistics[1]).sqrt().item())
    return {
        "n": n,
        "rank": rank,
        "exact_seconds": statistics.median(figures["exact"]),
        "seconds": statistics.median(figures["ours"]),
        "ratio": statistics.median(a / b for a, b in zip(figures["exact"], figures["ours"], strict=True)),
        # of the first turn: without training in between, the later ones find a weight that is nearly in 4 bits
        "exact_error": figures["exact error"][0],
        "error": figures["error"][0],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--turns", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(1)
    costs = []
    for n in options.sizes:
        for rank in (n // 4, n // 16):
            costs.append(cost(n, rank, options.turns))
            print(costs[-1], flush=True)
    write_json("update.json", {"options": vars(options), "costs": costs})
    header = ("n", "r", "exact, s", "LoQT's, s", "exact / LoQT's", "relative error left, exact", "LoQT's")
    rows = [
        (
            f"{c['n']} x {c['n']}",
            c["rank"],
            f"{c['exact_seconds']:.2f}",
            f"{c['seconds']:.3f}",
            f"{c['ratio']:.1f}",
            f"{c['exact_error']:.4f}",
            f"{c['error']:.4f}",
        )
        for c in costs
    ]
    text = "\n".join(
        [
            "# Update of one layer\n",
            f"K = {STEPS}, NF4 W and P; processor seconds on one thread, medians of {options.turns} turns:\n",
            markdown_table(header, rows),
            provenance(),
        ]
    )
    write_markdown("update.md", text)
    print("\n" + text)


if __name__ == "__main__":
    main()
