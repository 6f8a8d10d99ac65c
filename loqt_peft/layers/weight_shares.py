"""How the weights of a model with a LoQT adapter are held: in 4 bits, dense and frozen, or trained at full rank."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import bitsandbytes as bnb
from torch import nn

from ..findings import Finding
from ..layers.find import loqt_layers


# share of the weights in fused parameters from which on a user deserves a word
_MUCH = 1 / 3


@dataclass(frozen=True)
class WeightShares:
    """Counts of elements, tied ones once; LoQT's own P and B are not counted.

    Attributes:
        low_bit (`int`): In 4 bits, or so from the first update on: the quantized LoQT layers, and frozen 4-bit layers.
        low_rank_dense (`int`): In LoQT layers that are not quantized (`quantize_weight=None`).
        dense_frozen (`int`): Held as they were loaded, and not trained.
        full_rank (`int`): Trained at full rank, with gradients and optimizer states of their size.
        largest_dense_frozen (`dict[str, int]`):
            The three largest of `dense_frozen` by their names, in which `*` stands for the numbers of layers.
        largest_full_rank (`dict[str, int]`): Those of `full_rank`.
        fused_frozen (`dict[str, int]`):
            Those of `dense_frozen` that hold several matrices each, as the experts of a mixture of experts.
        fused_full_rank (`dict[str, int]`): Those of `full_rank`.
    """

    low_bit: int
    low_rank_dense: int
    dense_frozen: int
    full_rank: int
    largest_dense_frozen: dict[str, int]
    largest_full_rank: dict[str, int]
    fused_frozen: dict[str, int]
    fused_full_rank: dict[str, int]

    @property
    def total(self) -> int:
        return self.low_bit + self.low_rank_dense + self.dense_frozen + self.full_rank

    def __str__(self) -> str:
        parts = [f"{self._percent(self.low_bit)} in 4 bits"]
        if self.low_rank_dense:
            parts.append(f"{self._percent(self.low_rank_dense)} trained by LoQT without quantizing")
        parts.append(f"{self._percent(self.dense_frozen)} dense and frozen{self._named(self.largest_dense_frozen)}")
        parts.append(f"{self._percent(self.full_rank)} trained at full rank{self._named(self.largest_full_rank)}")
        return "weights: " + ", ".join(parts)

    def _percent(self, count: int) -> str:
        return f"{100 * count / max(self.total, 1):.1f}%"

    def _named(self, largest: dict[str, int]) -> str:
        return f" (most in {next(iter(largest))})" if largest else ""

    def findings(self) -> list[Finding]:
        """A warning if more than a third of the weights lies in fused parameters, which LoQT does not reach."""
        findings = []
        for fused, code, fate, remedy in (
            (
                self.fused_frozen,
                "fused_weights_frozen",
                "stays dense and frozen",
                "They keep their memory and learn nothing. `full_rank_modules` trains them, at full rank.",
            ),
            (
                self.fused_full_rank,
                "fused_weights_at_full_rank",
                "trains at full rank",
                "They need gradients and optimizer states of their size. To freeze them, let full_rank_modules name the "
                "other modules.",
            ),
        ):
            count = sum(fused.values())
            if count > _MUCH * self.total:
                names = ", ".join(f"{name} ({self._percent(n)})" for name, n in list(fused.items())[:3])
                what = (
                    f"{self._percent(count)} of the model's weights {fate}: each of {names} is one fused parameter for "
                    "several layers, which LoQT does not reach."
                )
                findings.append(Finding("warning", code, what, remedy))
        return findings


def weight_shares(model: nn.Module, adapter_name: str) -> WeightShares:
    """
    Args:
        model (`nn.Module`): A model with LoQT layers, or what holds one.
        adapter_name (`str`): The adapter.
    """
    low_bit = low_rank_dense = 0
    counted = set()
    for name, layer in loqt_layers(model):
        if adapter_name in layer.loqt_B:
            counted.add(f"{name}.base_layer.weight")
            if layer.config[adapter_name].quantize_weight is None:
                low_rank_dense += layer.in_features * layer.out_features
            else:
                low_bit += layer.in_features * layer.out_features

    frozen, full_rank = Counter(), Counter()
    fused_frozen, fused_full_rank = Counter(), Counter()
    for name, parameter in model.named_parameters():
        copy_of_other = ".modules_to_save." in name and f".modules_to_save.{adapter_name}." not in name
        if name in counted or ".loqt_" in name or ".original_module." in name or copy_of_other:
            continue
        if isinstance(parameter, bnb.nn.Params4bit):
            state = parameter.quant_state
            low_bit += parameter.numel() if state is None else state.shape.numel()
            continue
        if not parameter.is_floating_point():
            continue
        short = _pattern(name)
        (full_rank if parameter.requires_grad else frozen)[short] += parameter.numel()
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter.ndim >= 3 and parameter.shape[0] > 1 and not isinstance(owner, nn.modules.conv._ConvNd):
            (fused_full_rank if parameter.requires_grad else fused_frozen)[short] += parameter.numel()
    return WeightShares(
        low_bit,
        low_rank_dense,
        frozen.total(),
        full_rank.total(),
        dict(frozen.most_common(3)),
        dict(full_rank.most_common(3)),
        dict(fused_frozen.most_common()),
        dict(fused_full_rank.most_common()),
    )


def _pattern(name: str) -> str:
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
