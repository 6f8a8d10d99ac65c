"""Why a module cannot become a LoQT layer: whatever keeps its weight from being all there is to its output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import bitsandbytes as bnb
from accelerate.hooks import AlignDevicesHook, ModelHook
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..findings import Finding
from .layer import LoQTLayer


SUPPORTED = "nn.Linear, bitsandbytes' Linear4bit and transformers' Conv1D"

# class of a module in transformers -> linear layers of it whose `.weight` it reads instead of calling them, or changes in
# place, always or with some kernels, sizes or while it generates; LoQT would not act there (5.0 to 5.24)
READ_NOT_CALLED: dict[str, tuple[str, ...]] = {
    "ConditionalDetrMHAttentionMap": ("k_linear", "k_proj"),
    "DabDetrMHAttentionMap": ("k_linear",),
    "DeepseekOcr2TextMoe": ("gate",),
    "DeepseekV2Moe": ("gate",),
    "DetrMHAttentionMap": ("k_linear", "k_proj"),
    "FalconMambaMixer": ("dt_proj",),
    "Gemma3nTextAltUp": ("correction_coefs", "prediction_coefs"),
    "Gemma4AssistantForCausalLM": ("lm_head",),
    "Gemma4UnifiedAssistantForCausalLM": ("lm_head",),
    "JambaMambaMixer": ("dt_proj",),
    "LSHSelfAttention": ("query_key", "value"),
    "LayoutLMv2Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "LayoutLMv3Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "LongcatFlashTopkRouter": ("classifier",),
    "MambaMixer": ("dt_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "MobileBertLMPredictionHead": ("decoder", "dense"),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "PPDocLayoutV2ReadingOrderEncoder": ("rel_pos_bias",),
    "RwkvFeedForward": ("value",),
    "RwkvSelfAttention": ("output",),
    "TDNNLayer": ("kernel",),
    "VideoMAESelfAttention": ("key", "query", "value"),
    "WavLMAttention": ("k_proj", "out_proj", "q_proj", "v_proj"),
}

# RWKV divides weights in eval, against overflows of float16, unless its configuration says `rescale_every=0`
_RESCALED = ("RwkvFeedForward", "RwkvSelfAttention")

# subclasses of nn.Linear whose own `forward` is the same product
_SAME_FORWARD = {"FalconLinear"}
_FORWARDS = {nn.Linear.forward, Conv1D.forward, bnb.nn.Linear4bit.forward}

# what "all-linear" passes over; all else that cannot be a LoQT layer is refused there too
PASSED_OVER = frozenset({"computed_weight", "own_forward", "weight_read", "weight_shared"})


@dataclass(frozen=True)
class _Obstacle:
    code: str
    # continues "Target module ..." and "Target modules ..."
    what: str
    remedy: str = ""


def is_linear(module: nn.Module) -> bool:
    """Whether it is of a class that LoQT supports; it may have a `forward` of its own."""
    backend = resolve_quantization_backend(module)
    return isinstance(module, (nn.Linear, Conv1D)) and (backend is None or isinstance(module, bnb.nn.Linear4bit))


class TargetChecks:
    """Checks of a model's modules as targets; made anew when the model has changed.

    Args:
        model (`nn.Module`): As it is before the LoQT layers are put in.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.sharing: dict[int, list[str]] = defaultdict(list)
        places = set()
        for name, module in self.modules.items():
            parent, _, child = name.rpartition(".")
            # a block that is used twice is one place, a layer in two blocks is two
            place = (id(self.modules[parent]), child)
            if name and place not in places:
                for parameter in filter(lambda p: p is not None, module._parameters.values()):
                    self.sharing[id(parameter)].append(name)
            places.add(place)
        self.hooks = {name: _accelerate_hooks(module) for name, module in self.modules.items()}
        self.has_values = any(not p.is_meta for n, p in model.named_parameters() if ".loqt_" not in n)

    def offloaded(self, name: str) -> bool:
        """Whether the weights of the module at `name` come to a device for its forward pass only."""
        parts = name.split(".")
        for i in range(len(parts) + 1):
            for hook in self.hooks[".".join(parts[:i])]:
                if getattr(hook, "offload", False) and (i == len(parts) or hook.place_submodules):
                    return True
        return self.has_values and any(p.is_meta for p in self.modules[name].parameters(recurse=False))

    def obstacle(self, name: str) -> _Obstacle | None:
        """What keeps the module at `name` from becoming a LoQT layer."""
        if isinstance(self.modules[name], LoQTLayer):
            return None
        return (
            self._by_placement(name)
            or self._by_type(name)
            or self._by_weight(name)
            or self._by_forward(name)
            or self._by_parent(name)
            or self._by_sharing(name)
        )

    def _by_placement(self, name: str) -> _Obstacle | None:
        if self.offloaded(name):
            return _Obstacle(
                "offloaded",
                "is offloaded to the CPU or the disk: its weight is on a device during its forward pass only, and LoQT needs "
                "it at every update.",
                "Load the base model without offloading, whole on one device (`device_map={'': 0}`), in 4 bits if it is too "
                "large (`BitsAndBytesConfig(load_in_4bit=True)`).",
            )
        return None

    def _by_type(self, name: str) -> _Obstacle | None:
        target = self.modules[name]
        kind = type(target).__name__
        if isinstance(target, BaseTunerLayer):
            return _Obstacle(
                "other_adapter",
                f"cannot be a LoQT layer: it carries an adapter of another kind ({type(target).__module__}.{kind}).",
                "Merge that adapter first (`merge_and_unload`).",
            )
        if not is_linear(target):
            return _Obstacle("unsupported_type", f"is a {kind}, which LoQT does not support: only {SUPPORTED}.")
        return None

    def _by_weight(self, name: str) -> _Obstacle | None:
        target = self.modules[name]
        computed = [
            n for n in ("weight", "bias") if n not in target._parameters and getattr(target, n, None) is not None
        ]
        if computed:
            return _Obstacle(
                "computed_weight",
                f"has a {computed[0]} that is computed from other parameters (a parametrization, weight normalization or "
                "pruning), and LoQT would train a copy beside them.",
                "Remove it first (`torch.nn.utils.parametrize.remove_parametrizations`, `prune.remove`), or",
            )
        weight = target.weight
        if type(weight) is not nn.Parameter and not isinstance(weight, bnb.nn.Params4bit):
            return _Obstacle(
                "unsupported_weight", f"has a weight of type {type(weight).__name__}, which LoQT does not support."
            )
        return None

    def _by_forward(self, name: str) -> _Obstacle | None:
        target = self.modules[name]
        kind = type(target).__name__
        if type(target).forward not in _FORWARDS and kind not in _SAME_FORWARD:
            return _Obstacle(
                "own_forward",
                f"is a {kind}, a subclass of a linear layer with a `forward` of its own, which LoQT would skip.",
            )
        # accelerate's, which moves the input only
        aligns = all(type(hook) is AlignDevicesHook for hook in self.hooks[name]) and self.hooks[name]
        if "forward" in target.__dict__ and not aligns:
            return _Obstacle(
                "own_forward",
                "has a `forward` that was replaced on the instance, which LoQT would skip.",
                "Undo that, or",
            )
        return None

    def _by_parent(self, name: str) -> _Obstacle | None:
        path, _, child = name.rpartition(".")
        parent = self.modules[path]
        if isinstance(parent, nn.MultiheadAttention):
            return _Obstacle(
                "weight_read", "lies inside nn.MultiheadAttention, which uses its weight without calling it."
            )
        for cls in type(parent).__mro__:
            if child in READ_NOT_CALLED.get(cls.__name__, ()) and not _is_left_alone(parent, cls.__name__):
                return _Obstacle(
                    "weight_read",
                    f"lies inside a {cls.__name__}, which reads or changes its weight by itself, so that LoQT would not "
                    "act there.",
                    "Load the model with `rescale_every=0`, or" if cls.__name__ in _RESCALED else "",
                )
        return None

    def _by_sharing(self, name: str) -> _Obstacle | None:
        sharing = self.sharing[id(self.modules[name].weight)]
        others = [other for other in sharing if other != name]
        if others and name in sharing:
            embeddings = any(isinstance(self.modules[other], nn.Embedding) for other in others)
            return _Obstacle(
                "weight_shared",
                f"shares its weight with {others[0]!r}. LoQT would change the one and not the other.",
                "Untie them (`tie_word_embeddings=False`), or" if embeddings else "",
            )
        return None

    def findings(self, names: Iterable[str]) -> list[Finding]:
        """Errors, one for each kind of obstacle among the modules at `names`, with what to exclude."""
        names, found = list(names), defaultdict(list)
        for name in names:
            if (obstacle := self.obstacle(name)) is not None:
                found[obstacle.code if obstacle.code == "weight_shared" else obstacle].append((name, obstacle))
        return [_finding(group, names) for group in found.values()]


def _is_left_alone(parent: nn.Module, kind: str) -> bool:
    return kind in _RESCALED and parent.config.rescale_every == 0


def _finding(group: list[tuple[str, _Obstacle]], names: list[str]) -> Finding:
    held, obstacle = [name for name, _ in group], group[0][1]
    shown = ", ".join(map(repr, held[:3])) + (f" (and {len(held) - 3} more)" if len(held) > 3 else "")
    # full-rank modules must be at hand too
    noun, what = "module" if obstacle.code == "offloaded" else "target module", obstacle.what
    if len(held) == 1:
        noun = noun.capitalize()
    else:
        noun = f"Each of the {noun}s"
        what = what.replace("shares its weight with", "shares its weight with another module, the first one with")
    remedy = obstacle.remedy
    if not remedy or remedy.endswith("or"):
        exclusion = _exclusion(held, [name for name in names if name not in set(held)])
        remedy = f"{remedy} set exclude_modules={exclusion}.".strip()
        remedy = remedy[0].upper() + remedy[1:]
    return Finding("error", obstacle.code, f"{noun} {shown} {what}", remedy)


def _accelerate_hooks(module: nn.Module) -> Sequence[ModelHook]:
    hook = getattr(module, "_hf_hook", None)
    # several may be one
    return () if hook is None else getattr(hook, "hooks", (hook,))


def _exclusion(names: list[str], others: list[str]) -> str:
    """A value of `exclude_modules` that holds `names` and none of `others`, as short as it can be said."""
    parts = [name.split(".") for name in names]
    # a module around all of them
    for part in parts[0][:-1]:
        if not part.isdigit() and len({p[-1] for p in parts}) > 1 and all(part in p[:-1] for p in parts):
            if not any(part in other.split(".") for other in others):
                return repr(f"(.*[.])?{part}[.].*")
    for length in range(1, max(map(len, parts)) + 1):
        suffixes = sorted({".".join(p[-length:]) for p in parts})
        if not any(o == s or o.endswith(f".{s}") for o in others for s in suffixes):
            return repr(suffixes)
    return repr(sorted(names))
