"""LLaMA-60M on equal data: LoQT with the paper's recipe, and full-rank AdamW at two rates."""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from loqt_peft import LoQTConfig

from .claims import at_most, equal
from .results import Recorder
from .settings import Settings, endless


LOQT_RATE, FULL_RATES = 0.01, (0.001, 0.003)
# of a text that is small; more of them teach it by heart
EPOCHS, FEWEST_STEPS, MOST_STEPS = 16, 10, 400
# of a perplexity after a short run with one seed
SPREAD = 0.05


@dataclass(frozen=True)
class Protocol:
    """What all runs share.

    Attributes:
        steps (`int`): Optimizer steps.
        sequences (`int`): Of an optimizer step.
        micro_batch (`int`): Sequences of a micro-batch.
        evaluations (`int`): How often the validation loss is taken.
    """

    steps: int
    sequences: int
    micro_batch: int
    evaluations: int

    def rate(self, step: int) -> float:
        """Share of the peak rate: 10% warm-up, then a cosine to 10%."""
        warm_up = self.steps // 10
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step - warm_up) / (self.steps - warm_up)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


class Run:
    """One method on the common data.

    Args:
        settings ([`Settings`]): Device and sizes.
        config (`LoQTConfig`, *optional*): `None`: full rank.
    """

    def __init__(self, settings: Settings, config: LoQTConfig | None) -> None:
        self.settings, self.loqt = settings, config is not None
        torch.manual_seed(0)
        with settings.device:
            self.model: nn.Module = AutoModelForCausalLM.from_config(settings.config("60m"))
        self.model.config.use_cache = False
        if self.loqt:
            self.model = get_peft_model(self.model, config)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens.to(self.settings.device)
        with torch.autocast(self.settings.device.type, dtype=torch.bfloat16):
            return self.model(input_ids=tokens, labels=tokens).loss

    @torch.no_grad()
    def validate(self, blocks: torch.Tensor, micro_batch: int) -> float:
        self.model.eval()
        losses = [self.loss(part) for part in blocks.split(micro_batch)]
        self.model.train()
        return torch.stack(losses).mean().item()

    def train(self, data: dict[str, torch.Tensor], protocol: Protocol, lr: float) -> dict:
        """Validation losses, updates and speed."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
        every, losses, seconds, updates = max(protocol.steps // protocol.evaluations, 1), [], 0.0, 0
        batches = endless(data["training"], protocol.sequences)
        for step in range(protocol.steps):
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = lr * protocol.rate(step)
            updates += self._step(next(batches), protocol, optimizer, step)
            self.settings.synchronize()
            seconds += time.perf_counter() - start
            if (step + 1) % every == 0:
                losses.append(self.validate(data["validation"], protocol.micro_batch))
        tokens = protocol.steps * protocol.sequences * data["training"].shape[1]
        return {"validation losses": losses, "updates": updates, "tokens a second": tokens / seconds}

    def _step(self, batch: torch.Tensor, protocol: Protocol, optimizer: torch.optim.Optimizer, step: int) -> bool:
        parts = batch.split(protocol.micro_batch)
        last = [False]
        if self.loqt:
            self.model.begin_step(step, lambda: last[0])
        for index, part in enumerate(parts):
            last[0] = index == len(parts) - 1
            (self.loss(part) / len(parts)).backward()
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        update = self.model.end_step(optimizer) if self.loqt else None
        optimizer.zero_grad()
        return update is not None


def learning_60m(recorder: Recorder) -> None:
    settings = recorder.settings
    data = settings.tokens(settings.config("60m").vocab_size)
    data["validation"] = data["validation"][:512]
    # 512 sequences of 256 tokens: the paper's 131,072 a step
    steps = min(MOST_STEPS, EPOCHS * len(data["training"]) // 512)
    protocol = settings.pick(Protocol(steps, 512, 128, 10), Protocol(10, 8, 4, 2))
    if protocol.steps < FEWEST_STEPS:
        raise ValueError(f"{len(data['training'])} blocks make {protocol.steps} steps, and {FEWEST_STEPS} are needed.")
    # gaps as short as the run is; exact singular vectors may take minutes an update on CUDA
    changes = {
        "update_interval": max(protocol.steps // 6, 1),
        "projection": "randomized",
        **settings.pick({}, {"r": 16}),
    }
    config = LoQTConfig.paper("60m", **changes)
    recorder.figure("steps", protocol.steps)
    expected = sum(config.schedule.is_update_step(step) for step in range(protocol.steps))

    runs = [("LoQT", config, LOQT_RATE), *((f"full rank, rate {rate}", None, rate) for rate in FULL_RATES)]
    lowest = {}
    for label, chosen, rate in runs:
        found = Run(settings, chosen).train(data, protocol, rate)
        recorder.figure(label, found)
        lowest[label] = math.exp(min(found["validation losses"]))
        if chosen is not None:
            source = "LoQTConfig's schedule"
            recorder.claim(equal("updates", expected, found["updates"], unit="updates", source=source))
        gc.collect()
        settings.empty_cache()
    # as data repeats, the last loss may not be the lowest
    anchor = min(value for label, value in lowest.items() if label != "LoQT")
    claim, source = (
        "validation perplexity of LoQT, the lowest",
        "full-rank AdamW at the better of two rates, beside it",
    )
    recorder.claim(at_most(claim, anchor, lowest["LoQT"], SPREAD, source=source))
