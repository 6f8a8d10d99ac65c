"""Bytes of each process under FSDP2, counted in real steps on the CPU at 1, 2 and 4 processes, beside the formula; and the
formula's prediction for LLaMA-13B and -70B at 8.

    python -m benchmarks.memory.sharded

Counted is what each process holds of weights, gradients and optimizer state between the backward pass and `zero_grad`, at
the step of the second update, and its part of the original weights on the host. What a step needs beside that (activations,
the block that is gathered, the layer that an update works on) is not counted; the prediction states the largest block.

Results: results/sharded.json and results/sharded.md. About a minute on 2 cores.
"""

import os
import socket
import warnings


os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from benchmarks.common import llama, write_json, write_markdown
from loqt_peft import LoQTConfig, prepare_model_for_fully_shard
from loqt_peft.algorithm.packed_layout import packed_bytes
from loqt_peft.algorithm.projection import projection_shape, trainable_shape
from loqt_peft.layers.find import loqt_layers


PROCESSES = (1, 2, 4)
SMALL = {"hidden": 128, "layers": 4, "intermediate": 352, "vocabulary": 512}
RANK = 32
# hidden, intermediate, layers, rows of k and v, vocabulary, r
LARGE = {"13B, r 1024": (5120, 13824, 40, 5120, 32000, 1024), "70B, r 2048": (8192, 28672, 80, 1024, 32000, 2048)}
FLOAT32 = 4


def make_model():
    model = llama(**SMALL)
    model.name_or_path = "a tiny LLaMA"
    return get_peft_model(model, LoQTConfig(r=RANK, update_interval=1, interval_schedule="constant"))


def step(model, optimizer, number):
    tokens = torch.randint(0, SMALL["vocabulary"], (4, 32), generator=torch.Generator().manual_seed(number))
    model.begin_step(number)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    model.end_step(optimizer)


def nbytes(tensor):
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def count(model, optimizer):
    """Bytes of this process by kind, and of what every process holds whole."""
    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    moments = [value for state in optimizer.state.values() for value in state.values()]
    whole = {name for name, tensor in (parameters | buffers).items() if not isinstance(tensor, DTensor)}
    return {
        "W": sum(nbytes(buffer) for name, buffer in buffers.items() if ".loqt_weight." in name),
        "P": sum(nbytes(buffer) for name, buffer in buffers.items() if ".loqt_P." in name),
        "B": sum(nbytes(parameter) for name, parameter in parameters.items() if ".loqt_B." in name),
        "rest": sum(nbytes(parameter) for name, parameter in parameters.items() if ".loqt_B." not in name),
        "gradients": sum(nbytes(p.grad) for p in parameters.values() if p.grad is not None),
        "optimizer": sum(map(nbytes, moments)),
        "base weights on the host": sum(layer.base._part.nbytes for _, layer in loqt_layers(model)),
        "whole on each": sum(nbytes(tensor) for name, tensor in (parameters | buffers).items() if name in whole),
        "names of these": sorted(
            {name.removesuffix(".default").rpartition(".")[2] for name in whole if nbytes(buffers[name])}
        ),
    }


def work(rank, world, port, results):
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world)
    model = prepare_model_for_fully_shard(make_model())
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    step(model, optimizer, 0)
    optimizer.zero_grad()
    # the second update drops gradients of B, which belong to the old P
    model.begin_step(1)
    tokens = torch.randint(0, SMALL["vocabulary"], (4, 32), generator=torch.Generator().manual_seed(1))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    results[rank] = count(model, optimizer)
    model.end_step(optimizer)
    dist.barrier()
    os._exit(0)


def measure(world):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(work, args=(world, port, results), nprocs=world)
        return [dict(results[rank]) for rank in range(world)]


def formula(shapes, r, rest, trained_bytes=FLOAT32, moment_bytes=8, base_bytes=FLOAT32):
    """Bytes over all processes by kind; each process has its N-th part.

    W and P are packed: ½ byte an element, and absmax. B has `trained_bytes` an element, and as much in gradients;
    `moment_bytes` an element are kept of both moments.
    """
    ranks = {shape: min(r, *shape) for shape in shapes}
    B = sum(torch.Size(trainable_shape(shape, ranks[shape])).numel() for shape in shapes)
    double_quant = LoQTConfig().double_quant
    return {
        "W": sum(packed_bytes(shape, double_quant) for shape in shapes),
        "P": sum(packed_bytes(projection_shape(shape, ranks[shape]), double_quant) for shape in shapes),
        "B": B * trained_bytes,
        "rest": rest,
        "gradients": B * trained_bytes,
        "optimizer": B * moment_bytes,
        "base weights on the host": sum(rows * columns for rows, columns in shapes) * base_bytes,
    }


def block_shapes(hidden, intermediate, kv):
    attention = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    return attention + [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]


def small_formula():
    model = make_model()
    shapes = [layer.shape for _, layer in loqt_layers(model)]
    outside = [p for n, p in model.named_parameters() if ".base_layer." not in n and ".loqt_" not in n]
    return formula(shapes, RANK, sum(p.nbytes for p in outside))


def predict(hidden, intermediate, layers, kv, vocabulary, r, trained_bytes, processes=8):
    """bf16 weights outside LoQT layers, moments of B in 8 bits (torchao)."""
    shapes = block_shapes(hidden, intermediate, kv)
    rest = 2 * (2 * vocabulary * hidden + (2 * layers + 1) * hidden)
    total = formula(shapes * layers, r, rest, trained_bytes, moment_bytes=2, base_bytes=2)
    host = total.pop("base weights on the host")
    # in a step with mixed precision a block is gathered with B in bf16
    block = formula(shapes, r, 0, trained_bytes=2)
    return {
        "whole": sum(total.values()),
        "a process": sum(total.values()) / processes,
        "base weights on its host": host / processes,
        "largest block, gathered": block["W"] + block["P"] + block["B"],
        "by kind, a process": {kind: value / processes for kind, value in total.items()},
    }


def markdown(results):
    kinds = list(results["formula"])
    lines = ["# Bytes of a process under FSDP2", ""]
    lines += ["Counted at the step of the second update, and the formula / N; the largest of all processes.", ""]
    header = "| |" + "".join(f" N = {world}: counted | formula |" for world in PROCESSES)
    lines += [header, "|---|" + "--:|--:|" * len(PROCESSES)]
    for kind in kinds:
        row = f"| {kind} |"
        for world in PROCESSES:
            counted = max(process[kind] for process in results["counted"][str(world)])
            row += f" {counted:,} | {results['formula'][kind] / world:,.0f} |"
        lines.append(row)
    row = "| whole on each process |"
    for world in PROCESSES:
        row += f" {max(process['whole on each'] for process in results['counted'][str(world)]):,} | |"
    names = results["counted"][str(PROCESSES[-1])][0]["names of these"]
    lines += [row, "", f"Whole on each process: {', '.join(f'`{name}`' for name in names)}.", ""]
    lines += ["## Predicted for 8 processes", ""]
    lines += ["Moments in 8 bits, what is no LoQT layer in bf16; without activations. GB (10⁹ bytes).", ""]
    lines += [
        "| | whole | a process | base weights on its host | largest block, gathered in a step |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, found in results["predicted"].items():
        figures = [
            found[key] / 1e9 for key in ("whole", "a process", "base weights on its host", "largest block, gathered")
        ]
        lines.append(f"| {name} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
    return "\n".join(lines)


def main():
    results = {
        "formula": small_formula(),
        "counted": {str(world): measure(world) for world in PROCESSES},
        "predicted": {
            f"{name}, B and its gradient in {dtype}": predict(*shape, trained_bytes)
            for name, shape in LARGE.items()
            for dtype, trained_bytes in (("float32", 4), ("bf16", 2))
        },
    }
    write_json("sharded.json", {"results": results})
    write_markdown("sharded.md", markdown(results))


if __name__ == "__main__":
    main()
