"""Pretrain a small LLaMA from scratch twice, with LoQT in 4 bits and at full rank, and compare the two.

    python demo.py            # the run of `make demo`, minutes on 2 CPU cores
    python demo.py --fast     # a run of less than a minute, which shows that all parts work

The tokenizer, both models, `results.md` and `loss.png` go to `demo_output/`.
"""

import argparse
import json
import os
import shutil
from pathlib import Path


# before transformers is imported, which says much on its own
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
print("loqt_peft: a small LLaMA is pretrained twice, with LoQT in 4 bits and at full rank", flush=True)

import matplotlib
import torch
from peft import AutoPeftModelForCausalLM
from run_clm import main as run_clm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, TrainerCallback, set_seed


matplotlib.use("Agg")
import matplotlib.pyplot as plt

from loqt_peft.advice import CASES
from loqt_peft.plots import GREY, colour, name_lines, save, style


DATA = Path(__file__).parent / "data"
VOCABULARY, HIDDEN, LAYERS, BLOCK, BATCH = 1024, 128, 3, 128, 8
SEED = 0
PROMPT = "My fellow Americans,"
# the paper's settings: a quarter of the hidden size
PAPER = CASES["paper"]
# with fewer updates than these a rate that is higher at first decides
FEWEST_UPDATES = 5
METHODS = {
    "LoQT": [
        *("--method", "loqt", "--rank", str(HIDDEN // 4)),
        *("--loqt_alpha", str(PAPER.scale), "--learning_rate", str(PAPER.learning_rate)),
    ],
    "full rank": ["--method", "full", "--learning_rate", "0.002"],
}


class MemoryCounter(TrainerCallback):
    """Counts the bytes of weights, gradients and optimizer state on the first step that updates nothing but them."""

    def __init__(self):
        self.bytes: dict[str, int] = {}

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step != 1:
            return
        # After LoQT's first update the base weights rest on the host, out of the way of training.
        retained = [p for name, p in model.named_parameters() if name.endswith("base_layer.weight")]
        trained = [p for name, p in model.named_parameters() if not name.endswith("base_layer.weight")]
        moments = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        groups = {
            "weights": [*trained, *model.buffers()],
            "gradients": [p.grad for p in trained if p.grad is not None],
            "optimizer": moments,
            "retained": retained,
        }
        self.bytes = {name: sum(tensor.nbytes for tensor in tensors) for name, tensors in groups.items()}


def train_tokenizer(path: Path) -> None:
    """Write a byte-level BPE tokenizer of the training text; every document begins with `<s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train([str(DATA / "sotu_train.txt")], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)


def write_config(path: Path) -> None:
    LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=344,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=BLOCK,
        tie_word_embeddings=False,
    ).save_pretrained(path)


def train(name: str, output: Path, steps: int, eval_blocks: int | None) -> dict:
    """Train one method and return its metrics, its log history and the bytes of its tensors."""
    print(f"\n=== {name}: {steps} steps of {BATCH * BLOCK} tokens ===", flush=True)
    folder = output / name.replace(" ", "_")
    counter = MemoryCounter()
    arguments = {
        "config_name": output / "llama",
        "tokenizer_name": output / "tokenizer",
        "train_file": DATA / "sotu_train.txt",
        "validation_file": DATA / "sotu_validation.txt",
        "cache_dir": output / "cache",
        "output_dir": folder,
        "block_size": BLOCK,
        "per_device_train_batch_size": BATCH,
        "max_steps": steps,
        "update_interval": min(100, max(1, steps // 4)),
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": json.dumps({"min_lr_rate": 0.1}),
        "warmup_steps": steps // 10,
        "logging_steps": max(5, steps // 50),
        "save_strategy": "no",
        "report_to": "tensorboard",
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "do_train": True,
        "do_eval": True,
        "seed": SEED,
    }
    if eval_blocks is not None:
        arguments["max_eval_samples"] = eval_blocks
    argv = [part for option, value in arguments.items() for part in (f"--{option}", str(value))]
    metrics = run_clm([*argv, *METHODS[name]], callbacks=[counter])
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {"metrics": metrics, "history": history, "bytes": counter.bytes}


def update_logs(result: dict) -> list[dict]:
    return [entry for entry in result["history"] if "loqt/updates" in entry]


def table(results: dict[str, dict]) -> str:
    """Markdown; MB are 10^6 bytes."""
    rows = [
        "| | validation perplexity | weights MB | gradients MB | optimizer MB | sum MB | seconds | updates |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        parts = [result["bytes"][key] / 1e6 for key in ("weights", "gradients", "optimizer")]
        columns = [
            f"{result['metrics']['perplexity']:.2f}",
            *(f"{part:.2f}" for part in (*parts, sum(parts))),
            f"{result['metrics']['train_runtime']:.0f}",
            str(len(update_logs(result))),
        ]
        rows.append(f"| {name} | {' | '.join(columns)} |")
    retained = results["LoQT"]["bytes"]["retained"] / 1e6
    rows.append(
        f"""
Counted on an ordinary step. LoQT keeps another {retained:.2f} MB on the host, which are not in the sum: the original base
weights (`retain_base`), of which its adapter is a change. On an update step it also holds the gradient of one layer at
a time."""
    )
    rows += [f"\n{warning}" for warning in [too_short(results)] if warning]
    return "\n".join(rows)


def too_short(results: dict[str, dict]) -> str:
    """A sentence if the run says nothing of the two methods yet, else an empty one."""
    updates = len(update_logs(results["LoQT"]))
    steps = max(entry["step"] for entry in results["LoQT"]["history"])
    if updates > FEWEST_UPDATES and steps >= 500:
        return ""
    return (
        f"**Too short to compare**: {steps} steps with {updates} updates show that everything runs, and not which method is "
        "better. `make demo` takes 640 steps."
    )


def plot(results: dict[str, dict], path: Path) -> None:
    with style(white=True):
        figure, axes = plt.subplots(figsize=(8, 4.5))
        for entry in update_logs(results["LoQT"]):
            axes.axvline(entry["step"], color=GREY[0], linewidth=0.8, linestyle="--")
        for name, result in results.items():
            points = [(entry["step"], entry["loss"]) for entry in result["history"] if "loss" in entry]
            label = f"{name}\n(perplexity {result['metrics']['perplexity']:.1f})"
            axes.plot(*zip(*points, strict=True), color=colour(name), label=label, linewidth=1.5)
        axes.set_xlabel(f"optimizer step ({BATCH * BLOCK} tokens each); dashed: updates of LoQT")
        axes.set_ylabel("training loss (nats per token)")
        axes.set_title("LLaMA pretrained from scratch on State of the Union addresses")
        name_lines(axes)
        save(figure, path)


def sample(folder: Path) -> str:
    """A text by the saved LoQT model, loaded afresh."""
    model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    set_seed(SEED)
    tokens = model.generate(
        **prompt,
        max_length=BLOCK,
        do_sample=True,
        temperature=0.8,
        top_k=50,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="40 steps in place of 640, and less validation text")
    parser.add_argument("--steps", type=int, help="steps of each run")
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"))
    options = parser.parse_args()
    steps = options.steps or (40 if options.fast else 640)
    if steps < 2:
        parser.error("--steps must be at least 2")

    output = options.output_dir
    for name in METHODS:
        shutil.rmtree(output / name.replace(" ", "_"), ignore_errors=True)
    train_tokenizer(output / "tokenizer")
    write_config(output / "llama")
    results = {name: train(name, output, steps, 64 if options.fast else None) for name in METHODS}

    text = table(results)
    (output / "results.md").write_text(text + "\n")
    plot(results, output / "loss.png")
    print(f"\n{text}\n\nLoss curves: {output / 'loss.png'}\nTensorBoard: tensorboard --logdir {output}")
    adapter = output / "LoQT"
    print(f"\nA sample of the saved LoQT model, loaded afresh:\n\n{sample(adapter)}")
    print(
        f"""
What next:
  load it     import loqt_peft; AutoPeftModelForCausalLM.from_pretrained("{adapter}")
  look at it  loqt doctor {adapter}
  export it   loqt export {adapter} plain --to dense
  push it     model.push_to_hub("me/my-model")
  your text   python examples/from_scratch.py MY_TEXT.txt"""
    )


if __name__ == "__main__":
    main()
