"""Fine-tune an encoder to tell two kinds of lines apart: python examples/fine_tune.py MODEL ONE.txt OTHER.txt"""

import os
import sys
from pathlib import Path


# before transformers is imported, which says much on its own
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
print("loqt_peft: fine-tuning an encoder, in 4 bits", flush=True)

from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments, set_seed

from loqt_peft import LoQTConfig, LoQTTrainerCallback


name, *files = sys.argv[1:4] if len(sys.argv) > 3 else ["microsoft/MiniLM-L12-H384-uncased", "one.txt", "other.txt"]
epochs = float(sys.argv[4]) if len(sys.argv) > 4 else 3
set_seed(0)

tokenizer = AutoTokenizer.from_pretrained(name)
examples = [
    {**tokenizer(line, truncation=True, max_length=64), "labels": label}
    for label, file in enumerate(files)
    for line in Path(file).read_text(encoding="utf-8").splitlines()
]
held_out, training = examples[::10], [example for i, example in enumerate(examples) if i % 10]

model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
config = LoQTConfig(
    task_type="SEQ_CLS", r=32, loqt_alpha=2.0, projection="random", update_interval=2400, interval_schedule="constant"
)
model = get_peft_model(model, config)

args = TrainingArguments(
    "out",
    learning_rate=2e-4,
    num_train_epochs=epochs,
    per_device_train_batch_size=16,
    logging_steps=20,
    report_to="none",
)
trainer = Trainer(
    model,
    args,
    train_dataset=training,
    eval_dataset=held_out,
    processing_class=tokenizer,
    compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    callbacks=[LoQTTrainerCallback()],
)
trainer.train()
print(trainer.evaluate())
trainer.save_model("out/adapter")
print(
    "\nWhat next: `loqt doctor out/adapter`, `loqt export out/adapter out/plain --to dense`, model.push_to_hub('me/my-model')"
)
