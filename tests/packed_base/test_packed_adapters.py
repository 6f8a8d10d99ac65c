"""Adapters of a base that was packed as it was read: trained, saved, loaded, resumed, exported."""

import pytest
import torch
from common import TokenDataset, load_llama, loqt_config, make_trainer, tiny_llama, token_batch, train_steps
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from loqt_peft import LoQTQuantizationConfig, LoQTTrainerCallback, pack_model


SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(**SIZES).save_pretrained(folder, max_shard_size="100KB")
    return folder


def load(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=LoQTQuantizationConfig())


@pytest.mark.parametrize("retain_base", ["device", "cpu", "drop"])
def test_train_save_and_load_again_through_the_trainer(checkpoint, tmp_path, retain_base):
    model = get_peft_model(load(checkpoint), loqt_config(retain_base=retain_base))
    tokens = token_batch(9)
    with torch.no_grad():
        base = model(input_ids=tokens).logits
    make_trainer(model, tmp_path, [LoQTTrainerCallback()]).train()
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        trained = model(input_ids=tokens).logits
        if retain_base == "drop":
            with pytest.raises(ValueError, match="dropped at the first switch"), model.disable_adapter():
                pass
        else:
            with model.disable_adapter():
                assert torch.equal(model(input_ids=tokens).logits, base)
        # packed again, quantized by bitsandbytes, and dense
        for again in (load(checkpoint), load_llama(checkpoint, "4bit"), load_llama(checkpoint, "dense")):
            again = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
            assert torch.equal(again(input_ids=tokens).logits, trained)


def test_an_adapter_of_another_base_is_refused(checkpoint, tmp_path):
    model = get_peft_model(load(checkpoint), loqt_config())
    model.save_pretrained(tmp_path / "adapter")
    other = tiny_llama(seed=5, **SIZES)
    with pytest.raises(ValueError, match="made for other base weights"):
        PeftModel.from_pretrained(pack_model(other), tmp_path / "adapter")


def test_a_run_resumes_bit_for_bit(checkpoint, tmp_path):
    def run(folder, steps, resume=None):
        model = get_peft_model(load(checkpoint), loqt_config(update_interval=2))
        settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "constant"}
        trainer = make_trainer(model, folder, [LoQTTrainerCallback()], TokenDataset(), **settings)
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    through = run(tmp_path / "through", 6)
    run(tmp_path / "halves", 3)
    resumed = run(tmp_path / "halves", 6, str(tmp_path / "halves" / "checkpoint-3"))
    assert through.keys() == resumed.keys()
    assert all(torch.equal(through[name], resumed[name]) for name in through)


@pytest.mark.parametrize("to", ["dense", "bnb-4bit", "lora", "merge"])
def test_exports(checkpoint, tmp_path, to):
    model = get_peft_model(load(checkpoint), loqt_config())
    train_steps(model, 3)
    tokens = token_batch(9)
    with torch.no_grad():
        trained = model(input_ids=tokens).logits
    if to == "merge":
        model.merge_and_unload().save_pretrained(tmp_path)
    else:
        model.base_model.export(tmp_path, to, rank=64 if to == "lora" else None)
    if to == "lora":
        exported = PeftModel.from_pretrained(load(checkpoint), tmp_path)
    else:
        exported = LlamaForCausalLM.from_pretrained(tmp_path)
    # in eval, on processors with AVX512-BF16, bitsandbytes would round the absmax to bfloat16
    with torch.no_grad():
        error = (exported.train(to == "lora")(input_ids=tokens).logits - trained).abs().max()
    # what 4 bits lose of the sum is no error of the export
    assert error <= (0.5 if to == "bnb-4bit" else 1e-5)
