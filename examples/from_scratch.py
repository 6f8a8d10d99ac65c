"""Pretrain a small LLaMA from scratch on a text of your own, in 4 bits: python examples/from_scratch.py MY_TEXT.txt"""

import os
import sys
from pathlib import Path


# before transformers is imported, which says much on its own
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
print("loqt_peft: pretraining from scratch, in 4 bits", flush=True)

from peft import AutoPeftModelForCausalLM, get_peft_model
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from loqt_peft import LoQTConfig, LoQTTrainerCallback


HERE = Path(__file__).parent
text = Path(sys.argv[1] if len(sys.argv) > 1 else HERE / "pretraining" / "data" / "sotu_train.txt").read_text(
    encoding="utf-8"
)
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 300

bpe = ByteLevelBPETokenizer()
bpe.train_from_iterator([text], vocab_size=1024, special_tokens=["</s>"], show_progress=False)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="</s>", pad_token="</s>")
ids = tokenizer(text)["input_ids"]
blocks = [{"input_ids": ids[i : i + 128], "labels": ids[i : i + 128]} for i in range(0, len(ids) - 128, 128)]

model = LlamaForCausalLM(
    LlamaConfig(vocab_size=1024, hidden_size=128, intermediate_size=344, num_hidden_layers=3, num_attention_heads=4)
)
model.save_pretrained("out/base")  # the adapter is a change of it
model.name_or_path = "out/base"
config = LoQTConfig(
    task_type="CAUSAL_LM",
    r=96,
    loqt_alpha="auto",
    optimizer_state="rotate",
    full_rank_modules="all",
    update_interval=50,
)
model = get_peft_model(model, config)

args = TrainingArguments(
    "out", learning_rate=0.02, max_steps=steps, warmup_steps=steps // 10, logging_steps=20, report_to="none"
)
trainer = Trainer(model, args, train_dataset=blocks, processing_class=tokenizer, callbacks=[LoQTTrainerCallback()])
trainer.train()
trainer.save_model("out/adapter")

model = AutoPeftModelForCausalLM.from_pretrained("out/adapter")
prompt = tokenizer("The people of", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40, do_sample=True, pad_token_id=0)[0]))
print("\nWhat next: `loqt doctor out/adapter`, `loqt export out/adapter out/plain --to dense`")
