"""Peak memory of loading a base in 4 bits, counted on a checkpoint of 1.1 GB that is made here.

    python -m benchmarks.memory.loading

Makes a LLaMA of random weights in bfloat16, in several files, and loads it in a process of its own in each way: packed as it
is read (`LoQTQuantizationConfig`), by bitsandbytes through transformers, loaded densely and then packed (`pack_model`),
packed out of a model on `meta`, and densely. What torch's allocator hands out is counted event by event; what is read is
copied for it, as it would be to a device, since on the CPU tensors that were read stay in the file's pages. The mapping of
the files itself is not counted. The resident memory of the process is measured in a second run, without the copies. Then
the weights of the ways are compared bit for bit.

Results: results/loading.json and results/loading.md. It takes about 5 minutes.
"""

import argparse
import gc
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")

import torch
import transformers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.common import RESULTS, markdown_table, provenance, write_json, write_markdown
from loqt_peft import LoQTQuantizationConfig, pack_model


MIB = 2**20
LIMIT = 1.1
CONFIG = {
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}
BNB = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def from_pretrained(folder, quantization_config=None):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantization_config)


def out_of_meta(folder):
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(LlamaConfig.from_pretrained(folder), dtype=torch.bfloat16)
    return pack_model(model)


WAYS = {
    "packed as it is read": lambda folder: from_pretrained(folder, LoQTQuantizationConfig()),
    "bitsandbytes through transformers": lambda folder: from_pretrained(folder, BNB),
    "loaded, then packed": lambda folder: pack_model(from_pretrained(folder)),
    "initialized and packed from meta": out_of_meta,
    "dense, in 16 bits": from_pretrained,
}


def make(folder, settings):
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**settings), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="300MB")


###############################
# Counting
###############################


def tensors(model):
    """All that a model holds: parameters, buffers, and what belongs to a weight in 4 bits."""
    for module in model.modules():
        yield from (p for p in module._parameters.values() if p is not None)
        yield from (b for b in module._buffers.values() if b is not None)
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code)
            if state.nested:
                yield from (state.offset, state.state2.absmax, state.state2.code)


def nbytes(model):
    """Bytes of a model, tied weights once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors(model)}.values())


def checksum(model):
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def copy_what_is_read():
    original = transformers.core_model_loading._materialize_copy

    def copied(tensor, device=None, dtype=None):
        tensor = tensor[...]
        return tensor.clone() if dtype in (None, tensor.dtype) else original(tensor, device, dtype)

    transformers.core_model_loading._materialize_copy = copied


def counted(way, folder):
    copy_what_is_read()
    # in threads the profiler sees nothing
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    mapped = {file.stat().st_size for file in Path(folder).glob("*.safetensors")}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model = WAYS[way](folder)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    # a file that is mapped is reported as if it were allocated
    sizes = [event.nbytes() for event in events if abs(event.nbytes()) not in mapped]
    peak = max(itertools.accumulate(sizes))
    largest = max(tensor.numel() for tensor in tensors(dense_shapes(folder))) * torch.bfloat16.itemsize
    return {"model": nbytes(model), "peak": peak, "largest tensor": largest, "checksum": checksum(model)}


def dense_shapes(folder):
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig.from_pretrained(folder))


def resident(way, folder):
    """Largest anonymous and whole resident memory beyond that from before, in bytes."""

    def status(field):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
        return 0

    gc.collect()
    before, whole_before = status("RssAnon"), status("VmRSS")
    largest, done = [before], threading.Event()

    def watch():
        while not done.wait(0.002):
            largest.append(status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = WAYS[way](folder)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    del model
    # `ru_maxrss` would be inherited from the process that started this one
    return {"anonymous": max(largest) - before, "resident": status("VmHWM") - whole_before, "seconds": seconds}


###############################
# All of it
###############################


def in_a_process(kind, way, folder):
    command = [sys.executable, "-m", "benchmarks.memory.loading", "--measure", kind, way, str(folder)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def markdown(result):
    rows = []
    for way, row in result["ways"].items():
        bound = LIMIT * row["model"] + row["largest tensor"]
        rows.append(
            (
                way,
                f"{row['model'] / MIB:.0f}",
                f"{row['peak'] / MIB:.0f}",
                f"{(row['peak'] - row['largest tensor']) / row['model']:.3f}",
                "yes" if row["peak"] <= bound else "no",
                f"{row['anonymous'] / MIB:.0f}",
                f"{row['resident'] / MIB:.0f}",
                f"{row['seconds']:.1f}",
            )
        )
    largest = next(iter(result["ways"].values()))["largest tensor"]
    header = ("", "model", "peak", "(peak - largest) / model", "within the bar", "RSS, anonymous", "RSS, all", "s")
    return "\n".join(
        [
            "# Loading in 4 bits\n",
            f"A LLaMA of {result['parameters'] / 1e6:.0f}M parameters, a checkpoint of {result['checkpoint'] / 1e9:.2f} GB",
            f"in {result['files']} files, bfloat16; its largest tensor has {largest / MIB:.0f} MiB. Figures are in MiB.",
            f"Model: what is held in the end. The bar: at most {LIMIT} times the model and the largest tensor. Peak: counted",
            "by torch's allocator. RSS: growth of the process; all of it has the pages of the file, which the system takes",
            "back when it needs them.\n",
            markdown_table(header, rows),
            f"\nWeights of the first three, bit for bit equal: {'yes' if result['equal'] else 'NO'}.\n",
            provenance(),
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=3, metavar=("KIND", "WAY", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help="a small model; nothing is written")
    options = parser.parse_args()
    if options.measure:
        kind, way, folder = options.measure
        print(json.dumps({"counted": counted, "resident": resident}[kind](way, folder)))
        return
    settings = {**CONFIG, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 100} if options.tiny else CONFIG
    folder = Path(tempfile.mkdtemp(prefix="loading-"))
    try:
        make(folder, settings)
        files = list(folder.glob("*.safetensors"))
        ways = {w: in_a_process("counted", w, folder) | in_a_process("resident", w, folder) for w in WAYS}
        result = {
            "parameters": sum(p.numel() for p in dense_shapes(folder).parameters()),
            "checkpoint": sum(file.stat().st_size for file in files),
            "files": len(files),
            "equal": len({row["checksum"] for row in list(ways.values())[:3]}) == 1,
            "ways": ways,
        }
    finally:
        shutil.rmtree(folder)
    print(markdown(result))
    if not options.tiny:
        write_json("loading.json", result)
        write_markdown("loading.md", markdown(result))
        print(f"Written to {RESULTS}.")


if __name__ == "__main__":
    main()
