"""Run by test_distributed.py under torchrun: trains with the Trainer and saves what each process ends up with."""

import itertools
import os
import sys
import types

import torch
from common import TokenDataset, loqt_config, make_trainer, tiny_llama
from peft import get_peft_model
from safetensors.torch import save_file

from loqt_peft import LoQTTrainerCallback
from loqt_peft.layers.find import loqt_layers
from loqt_peft.training import distributed, performance, switching


def main(output_dir, batch_size, accumulation, update_mode, projection):
    # P in 32 bits and W dense in one of the layers' formats would hide nothing: all is quantized here
    config = loqt_config(
        update_interval=2,
        full_rank_modules="all",
        update_mode=update_mode,
        projection=projection,
        error_feedback=True,
    )
    model = get_peft_model(tiny_llama(), config)
    names = {layer: name for name, layer in loqt_layers(model)}
    gradients = {}

    def project_gradient(layer, adapter_name, gradient):
        # by the owner of the layer only
        if trainer.state.global_step == 0:
            gradients[f"gradient.{names[layer]}"] = gradient.clone()
        return switching.project_gradient(layer, adapter_name, gradient)

    distributed.project_gradient = project_gradient
    # a clock that goes by a second a look
    performance.time = types.SimpleNamespace(perf_counter=itertools.count().__next__)
    trainer = make_trainer(
        model,
        output_dir,
        [LoQTTrainerCallback()],
        dataset=TokenDataset(size=64),
        max_steps=5,
        logging_steps=5,
        per_device_train_batch_size=int(batch_size),
        gradient_accumulation_steps=int(accumulation),
        ddp_find_unused_parameters=False,
    )
    trainer.train()
    tensors = {k: v.contiguous().clone() for k, v in model.state_dict().items() if "base_layer" not in k}
    speeds = [entry["loqt/tokens_per_second"] for entry in trainer.state.log_history if "loss" in entry]
    tensors["tokens_per_second"] = torch.tensor(speeds)
    save_file({**tensors, **gradients}, f"{output_dir}/rank{trainer.args.process_index}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    # gloo's threads drop tensors that Python knows, and abort the process if the interpreter is ending by then
    # (pytorch/pytorch#179291); destroy_process_group does not end the threads while DDP holds the group
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
