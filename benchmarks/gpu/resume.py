"""DDP of one process, with the stock Trainer: a run resumed from a checkpoint after updates ends like one that was not.

    python -m benchmarks.gpu.resume DEVICE FOLDER

is the process that trains: accelerate keeps what it has once seen of its surroundings.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from loqt_peft import LoQTConfig, LoQTTrainerCallback
from loqt_peft.layers.find import loqt_layers

from .claims import equal
from .results import Recorder
from .settings import ROOT, TINY


STEPS, SAVED, INTERVAL = 6, 3, 2


class Tokens(torch.utils.data.Dataset):
    """Random token ids, the same for all runs."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(TINY["vocab_size"], (4 * STEPS, 32), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class SeesDDP(LoQTTrainerCallback):
    """Notes whether the Trainer wrapped the model."""

    trainer: Trainer | None = None
    wrapped = False

    def on_step_end(self, args, state, control, **kwargs):
        self.wrapped = isinstance(self.trainer.model_wrapped, DistributedDataParallel)
        return super().on_step_end(args, state, control, **kwargs)


def train(folder: Path, device: str, resume: Path | None) -> tuple[dict[str, torch.Tensor], bool, set[str]]:
    """All tensors at the end, whether DDP was in use, and where the base weights lay."""
    torch.manual_seed(0)
    config = LoQTConfig(
        r=8, update_interval=INTERVAL, interval_schedule="constant", full_rank_modules="all", task_type="CAUSAL_LM"
    )
    llama = LlamaConfig(**TINY, tie_word_embeddings=False, attn_implementation="eager")
    model = get_peft_model(LlamaForCausalLM(llama), config)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        save_steps=SAVED,
        report_to="none",
        use_cpu=device == "cpu",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=False,
    )
    callback = SeesDDP()
    trainer = Trainer(model, args, train_dataset=Tokens(), callbacks=[callback])
    callback.trainer = trainer
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    places = {layer.get_base_layer().weight.device.type for _, layer in loqt_layers(model)}
    tensors = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items() if "base_layer" not in name}
    return tensors, callback.wrapped, places


def compare(device: str, folder: Path) -> dict:
    """Train through, and once more from the checkpoint in the middle."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    through, wrapped, places = train(folder / "through", device, None)
    resumed, _, _ = train(folder / "resumed", device, folder / "through" / f"checkpoint-{SAVED}")
    updates = [int(tensor[0]) for name, tensor in through.items() if "loqt_state" in name]
    difference = max((resumed[name].double() - through[name].double()).abs().max().item() for name in through)
    return {"wrapped": wrapped, "base": sorted(places), "updates": max(updates), "difference": difference}


def nccl_resume(recorder: Recorder) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        # what torchrun says to its one process
        launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        surroundings = {**os.environ, **launched, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        command = [sys.executable, "-m", "benchmarks.gpu.resume", recorder.settings.device.type, folder]
        ended = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(ended.stderr[-4000:])
        found = json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
    recorder.figure("found", found)
    updates = len(range(0, STEPS, INTERVAL))
    source = "LoQTConfig's schedule"
    recorder.claim(equal("updates of the run", updates, found["updates"], unit="updates", source=source))
    if not recorder.settings.tiny:
        recorder.claim(equal("the Trainer wraps the model in DDP", True, found["wrapped"], source="the Trainer"))
        recorder.claim(equal("where the base lies", "cpu", ", ".join(found["base"]), source="retain_base='cpu'"))
    claim, source = "difference between resumed and uninterrupted, largest", "resuming is exact"
    recorder.claim(equal(claim, 0.0, found["difference"], source=source))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    found = compare(options.device, options.folder)
    (options.folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    # threads of the process group may abort a process that ends in the ordinary way (pytorch/pytorch#179291)
    os._exit(0)


if __name__ == "__main__":
    main()
