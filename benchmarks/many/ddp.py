"""An update step under DDP at 1, 2 and 4 processes: what a rank holds, what the update takes, what goes over the wire.

    python -m benchmarks.many.ddp

A LLaMA of 25M weights in LoQT layers trains with gloo on this machine, two sequences a process, an update at every second
step. Of each update step are measured, beside the formulas of docs/many-cards.md:

- the bytes of captured gradients that a rank holds, at their most within backward and when backward has ended;
- the update's seconds, as time passes and of the processor: processes beyond the cores of the machine wait for one another;
- the bytes over the loopback device. Other traffic there counts too: `unshare -n` gives the command a device of its own.

One process runs with `update_mode="whole"`, so that all of its update comes after backward too. Beside it the bytes that DDP
keeps for the gradients of what it trains once they are gone: per-layer updates would free none of them.

Results: results/many_ddp.json and results/many_ddp.md.
"""

import argparse
import ctypes
import gc
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel

from benchmarks.common import llama, markdown_table, provenance, write_json, write_markdown
from loqt_peft import LoQTConfig
from loqt_peft.layers.capture import GradientCapture
from loqt_peft.layers.find import loqt_layers
from loqt_peft.training.switching import empty_switch


MODEL = {"hidden": 512, "layers": 8, "intermediate": 1376, "vocabulary": 1024, "heads": 8}
RANK = 128
STEPS = 6


class Held:
    """Bytes of the gradients that captures were given and that are still alive; on the CPU nobody copies them."""

    def __init__(self):
        self.alive, self.peak = [], 0
        add = GradientCapture.add

        def watched(capture, gradient):
            self.alive.append(weakref.ref(gradient))
            self.peak = max(self.peak, self.now())
            add(capture, gradient)

        GradientCapture.add = watched

    def now(self):
        tensors = [tensor for tensor in (reference() for reference in self.alive) if tensor is not None]
        self.alive = [weakref.ref(tensor) for tensor in tensors]
        return sum(tensor.nbytes for tensor in tensors)

    def start(self):
        self.alive.clear()
        self.peak = 0


def resident():
    """Resident bytes, after what is free was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def kept_by_ddp():
    """Bytes that stay after backward when each gradient is gone, and bytes of the gradients."""
    module = torch.nn.Sequential(*[torch.nn.Linear(2048, 2048, bias=False) for _ in range(12)])
    x = torch.ones(1, 2048)

    def after_backward(wrapped):
        for _ in range(2):
            wrapped(x).sum().backward()
            module.zero_grad(set_to_none=True)
        return resident()

    plain = after_backward(module)
    parallel = DistributedDataParallel(module, gradient_as_bucket_view=True)
    return after_backward(parallel) - plain, sum(p.nbytes for p in module.parameters())


def loopback_bytes():
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[0])
    return 0


def together():
    if dist.is_initialized():
        dist.barrier()


def step(model, parallel, optimizer, number, held):
    """Figures of one optimizer step."""
    held.start()
    together()
    before = loopback_bytes()
    together()
    model.begin_step(number, lambda: True)
    generator = torch.Generator().manual_seed(1000 * number + int(os.environ.get("RANK", 0)))
    tokens = torch.randint(0, MODEL["vocabulary"], (2, 64), generator=generator)
    start = time.perf_counter(), time.process_time()
    parallel(input_ids=tokens, labels=tokens).loss.backward()
    backward = time.perf_counter() - start[0]
    figures = {"held": held.now(), "held_peak": held.peak}
    optimizer.step()
    together()
    start = time.perf_counter(), time.process_time()
    update = model.end_step(optimizer)
    together()
    figures |= {
        "step_seconds": backward,
        "seconds": time.perf_counter() - start[0],
        "processor_seconds": time.process_time() - start[1],
        "is_update": update is not None,
    }
    optimizer.zero_grad()
    together()
    return figures | {"wire": loopback_bytes() - before}


def work(folder):
    torch.set_num_threads(1)
    processes = int(os.environ["WORLD_SIZE"])
    if processes > 1:
        dist.init_process_group("gloo")
    buckets = kept_by_ddp() if processes > 1 else None
    mode = "backward" if processes > 1 else "whole"
    config = LoQTConfig(r=RANK, update_interval=2, interval_schedule="constant", update_mode=mode)
    model = get_peft_model(llama(**MODEL), config).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    parallel = DistributedDataParallel(model) if processes > 1 else model
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    held = Held()
    figures = [step(model, parallel, optimizer, number, held) for number in range(STEPS)]
    layers = [layer for _, layer in loqt_layers(model)]
    result = {
        # the first steps allocate what stays
        "steps": figures[2:],
        "weights": sum(layer.out_features * layer.in_features for layer in layers),
        "state": sum(t.nbytes for layer in layers for t in empty_switch(layer, "default") if t is not None),
        "kept_by_ddp": buckets,
    }
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)


def run(processes):
    """The figures of all ranks."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(processes):
            environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            command = [sys.executable, "-m", "benchmarks.many.ddp", "--work", folder]
            started.append(subprocess.Popen(command, env=environment))
        if any(process.wait() for process in started):
            sys.exit(f"a process of {processes} failed")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(processes)]


def summary(ranks):
    """Over the ranks, of medians over the updates; a rank's bytes are those of the rank that holds most."""

    def figure(key, update=True, over=max):
        return over(
            statistics.median(step[key] for step in rank["steps"] if step["is_update"] == update) for rank in ranks
        )

    size, first = len(ranks), ranks[0]
    gradients, state = 4 * first["weights"], first["state"]
    wire = figure("wire") - figure("wire", update=False)
    return {
        "processes": size,
        "kept_by_ddp": first["kept_by_ddp"],
        "held": figure("held"),
        "held_formula": gradients // size,
        "held_peak": figure("held_peak"),
        "seconds": figure("seconds"),
        "processor_seconds": figure("processor_seconds"),
        "all_processor_seconds": figure("processor_seconds", over=sum),
        "step_seconds": figure("step_seconds", update=False),
        "update_step_seconds": figure("step_seconds"),
        "wire": wire,
        # gloo reduces by a ring and gathers the result, and broadcasts along a tree
        "wire_formula": (size - 1) * (gradients + gradients // size + state),
    }


def report(results):
    mb = 1e6
    rows = [
        (
            r["processes"],
            f"{r['held'] / mb:.1f}",
            f"{r['held_formula'] / mb:.1f}",
            f"{r['held_peak'] / mb:.1f}",
            f"{r['seconds']:.2f}",
            f"{r['processor_seconds']:.2f}",
            f"{r['all_processor_seconds']:.2f}",
            f"{r['step_seconds']:.2f}",
            f"{r['update_step_seconds']:.2f}",
            f"{r['wire'] / mb:.1f}",
            f"{r['wire_formula'] / mb:.1f}",
        )
        for r in results
    ]
    header = (
        "processes",
        "gradients held after backward, MB a rank",
        "4 bytes · weights / N",
        "at most, within backward",
        "update, s",
        "processor s of the busiest rank",
        "of all ranks",
        "ordinary forward and backward, s",
        "of an update step, s",
        "over the wire for an update, MB",
        "formula",
    )
    return "\n".join(
        [
            "# An update step under DDP\n",
            f"LLaMA, hidden {MODEL['hidden']}, {MODEL['layers']} layers, r {RANK}, float32, gloo; MB = 10^6 bytes, medians "
            "over the updates after the first, of the rank with most.\n",
            markdown_table(header, rows),
            *[
                f"DDP at {r['processes']} processes, with `gradient_as_bucket_view`, kept {r['kept_by_ddp'][0] / mb:.1f} MB "
                f"for {r['kept_by_ddp'][1] / mb:.1f} MB of gradients when they were gone.\n"
                for r in results
                if r["kept_by_ddp"]
            ],
            provenance(),
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work)
    results = []
    for processes in options.processes:
        results.append(summary(run(processes)))
        print(results[-1], flush=True)
    write_json("many_ddp.json", {"model": MODEL, "rank": RANK, "results": results})
    write_markdown("many_ddp.md", report(results))
    print("\n" + report(results))


if __name__ == "__main__":
    main()
