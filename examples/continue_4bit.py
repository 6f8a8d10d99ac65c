"""Continue a trained model in 4 bits on a text of your own: python examples/continue_4bit.py MODEL MY_TEXT.txt"""

import os
import sys
from pathlib import Path


# before transformers is imported, which says much on its own
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
print("loqt_peft: continuing a trained model, in 4 bits", flush=True)

import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

from loqt_peft import LoQTConfig, LoQTTrainerCallback


name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
text = Path(
    sys.argv[2] if len(sys.argv) > 2 else Path(__file__).parent / "pretraining" / "data" / "sotu_train.txt"
).read_text(encoding="utf-8")
steps = int(sys.argv[3]) if len(sys.argv) > 3 else 200
dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32

tokenizer = AutoTokenizer.from_pretrained(name)
ids = tokenizer(text)["input_ids"]
blocks = [{"input_ids": ids[i : i + 128], "labels": ids[i : i + 128]} for i in range(0, len(ids) - 128, 128)]

four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
model = AutoModelForCausalLM.from_pretrained(name, quantization_config=four_bits, dtype=dtype)
model = prepare_model_for_kbit_training(model)
rank = model.config.hidden_size // 4
config = LoQTConfig(task_type="CAUSAL_LM", r=rank, loqt_alpha="auto", error_feedback=True, update_interval=50)
model = get_peft_model(model, config)

args = TrainingArguments(
    "out", learning_rate=0.01, max_steps=steps, warmup_steps=steps // 10, logging_steps=20, report_to="none"
)
trainer = Trainer(model, args, train_dataset=blocks, processing_class=tokenizer, callbacks=[LoQTTrainerCallback()])
trainer.train()
trainer.save_model("out/adapter")
print(
    "\nWhat next: `loqt doctor out/adapter`, `loqt export out/adapter out/plain --to dense`, model.push_to_hub('me/my-model')"
)
