"""Every knob of a LoQT adapter, validated."""

from __future__ import annotations

import difflib
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from peft.utils import PeftType

from ._moved import moved_names
from .advice import AUTO_CONSTANT, CASES, DEFAULT_SCALE, PAPER
from .algorithm.schedule import UpdateSchedule
from .config_checks import check_fields
from .findings import LoQTWarning
from .saving.seal import FORMAT_VERSION


__getattr__ = moved_names(__name__)

# twice the scale of the paper's GLUE runs, the largest that it names
LARGEST_USUAL_SCALE = 4
# names that the configs of other methods have for what LoQT calls otherwise, or does not have
OTHER_NAMES = {
    "rank": "The rank is `r`.",
    "lora_r": "The rank is `r`.",
    "alpha": "LoQT's scale is `loqt_alpha`: s itself, not divided by r. LoRA's lora_alpha / r corresponds to it.",
    "lora_alpha": "LoQT's scale is `loqt_alpha`: s itself, not divided by r. LoRA's lora_alpha / r corresponds to it.",
    "scale": "LoQT's scale s is `loqt_alpha`.",
    "scaling": "LoQT's scale s is `loqt_alpha`.",
    "use_rslora": "Leave it out: `loqt_alpha` is not divided by r. A scale that suits every rank is loqt_alpha='auto'.",
    "lora_dropout": "Leave it out: LoQT has no dropout of its own.",
    "dropout": "Leave it out: LoQT has no dropout of its own.",
    "bias": "Leave it out: biases train with full_rank_modules='all'.",
    "lora_bias": "Leave it out: biases train with full_rank_modules='all'.",
    "use_dora": "Leave it out: LoQT has no magnitudes of its own.",
    "fan_in_fan_out": "Leave it out: LoQT knows the layout of nn.Linear and Conv1D by itself.",
    "init_lora_weights": "It is `init_weights` here.",
    "update_proj_gap": "The gap between updates is `update_interval`.",
    "proj_type": "How P is made is `projection`.",
    "quant_type": "The storage of W is `quantize_weight`, that of P `quantize_projection`.",
    "bnb_4bit_quant_type": "The storage of W is `quantize_weight`, that of P `quantize_projection`.",
    "use_double_quant": "It is `double_quant` here.",
    "bnb_4bit_use_double_quant": "It is `double_quant` here.",
}


@dataclass
class LoQTConfig(PeftConfig):
    """Configuration of a LoQT adapter (arXiv 2405.16528).

    A scale (`loqt_alpha`, `alpha_pattern`) above 4 brings a warning: the paper's are 0.25 to 2.

    Raises:
        ValueError: If a field has a value that is not allowed; the message names field, value and what is allowed.
        TypeError: For a keyword that is no field; if another method's config calls something so, the message says what it is
            called here.
    """

    # called with a config and the folder that it was saved in; without an annotation, since it is no field
    on_saved = []  # type: ignore[var-annotated]

    r: int = field(default=64, metadata={"help": "Rank of P and B; clamped to min(in, out) of each layer."})
    loqt_alpha: float | Literal["auto"] = field(
        default=DEFAULT_SCALE,
        metadata={
            "help": "The paper's scale s, used as is: not divided by r. 'auto': "
            f"s = {AUTO_CONSTANT} / √(r·min(in, out)) for each layer, which goes with a learning rate of "
            f"{CASES['pretrain'].learning_rate:g} from scratch and {CASES['continue'].learning_rate:g} from a trained base."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the modules to train with LoQT, or a regex (a string). 'all-linear' means all linear layers "
            "but the output head, and so does None, but for the encoders and seq2seq models that "
            "`loqt_peft.layers.target_modules` lists: there None means the linear layers of their blocks."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of modules to leave out, or a regex (a string)."}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of modules of which a copy is trained and saved. For large modules `full_rank_modules` needs no "
            "copy."
        },
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Rows of the input embedding that are trained, or name of an embedding -> rows; as in `LoraConfig`. Of no "
            "effect with full_rank_modules='all', which trains all of them."
        },
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Module name or regex -> a rank that differs from r."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Module name or regex -> a scale that differs from loqt_alpha."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to transform. Needs target_modules as a list of names."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the layer list, if it is not a common one. Needs layers_to_transform."},
    )
    quantize_weight: Literal["nf4", "fp4"] | None = field(
        default="nf4", metadata={"help": "Storage of W from the first switch on. None: dense (LoQT-nq)."}
    )
    quantize_projection: Literal["nf4", "fp4"] | None = field(
        default="nf4", metadata={"help": "Storage of P. None: dense."}
    )
    double_quant: bool = field(default=False, metadata={"help": "Quantize the absmax of W and P to 8 bits too."})
    compensation_steps: int = field(
        default=5, metadata={"help": "K, iterations of error compensation at a switch. 0 turns compensation off."}
    )
    error_feedback: bool = field(
        default=False,
        metadata={
            "help": "Keep what quantization and compensation left over of W, itself quantized like W, in the memory of the "
            "host, and merge it at the next switch, so that errors do not add up. Needs quantize_weight."
        },
    )
    update_interval: int = field(default=100, metadata={"help": "τ of the gaps between updates, in optimizer steps."})
    interval_schedule: Literal["exponential", "linear", "constant"] = field(
        default="exponential", metadata={"help": "gap_i = τ + ⌊ψ^i⌋, τ + ⌊ψ·i⌋ or τ."}
    )
    interval_growth: float = field(default=1.2, metadata={"help": "ψ of the growing gaps."})
    max_interval: int | None = field(default=None, metadata={"help": "Cap on the gap, in optimizer steps."})
    projection: Literal["svd", "eigh", "randomized", "random"] = field(
        default="randomized",
        metadata={
            "help": "How P is computed from the gradient: its singular vectors, exactly, by the Gram matrix, or by a "
            "randomized range finder. 'random': directions that have nothing to do with it, from torch's seed; an update "
            "then takes no gradient of W, and its step needs no more memory than an ordinary one, in every update_mode."
        },
    )
    optimizer_state: Literal["keep", "reset", "rotate"] = field(
        default="keep",
        metadata={
            "help": "What becomes of B's optimizer state at a switch: left as it is, forgotten, or its first moment rotated "
            "into the new subspace."
        },
    )
    full_rank_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of modules that are not targeted and train in place at full rank, saved with the adapter, without "
            "a second copy. 'all': everything but the targeted weights (embeddings, norms, head, biases)."
        },
    )
    retain_base: Literal["device", "cpu", "drop"] = field(
        default="cpu",
        metadata={
            "help": "Where the original base weights stay after the first switch. With 'drop', disable_adapter, unload and "
            "further adapters are impossible."
        },
    )
    update_mode: Literal["backward", "stagger", "whole"] = field(
        default="backward",
        metadata={
            "help": "How an update step bounds the memory of its gradients. 'backward': each layer's gradient is made into P "
            "within the step's last backward pass, and freed. 'stagger': so, but one block of the model at a time, on "
            "consecutive steps. 'whole': the gradients of all layers are kept until the optimizer has stepped."
        },
    )
    offload_gradients: bool | None = field(
        default=None,
        metadata={
            "help": "Whether what an update step keeps of the gradients (sums over micro-batches, the new P) lies on the CPU. "
            "None: but with update_mode='whole'."
        },
    )
    init_weights: bool = field(
        default=True, metadata={"help": "False: a random adapter that is not the identity. For tests."}
    )
    num_updates: int = field(
        default=0,
        metadata={"help": "Updates that the saved adapter has been through. Set by training, not by the user."},
    )
    format_version: int | None = field(
        default=None,
        compare=False,
        metadata={"help": "Format of the saved adapter. Set when it is saved, not by the user."},
    )

    def __post_init__(self):
        super().__post_init__()
        # the member is added to the enum by loqt_peft/__init__.py
        self.peft_type = PeftType.LOQT
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        self.rank_pattern = self.rank_pattern or {}
        self.alpha_pattern = self.alpha_pattern or {}
        check_fields(self)
        # a saved adapter has been trained with its scale
        if self.format_version is None:
            self._warn_of_large_scales()

    def _warn_of_large_scales(self) -> None:
        scales = {"loqt_alpha": self.loqt_alpha}
        scales |= {f"alpha_pattern[{name!r}]": scale for name, scale in self.alpha_pattern.items()}
        large = [f"{name}={s!r}" for name, s in scales.items() if s != "auto" and s > LARGEST_USUAL_SCALE]
        if large:
            warnings.warn(
                f"{', '.join(large)}: this is the paper's scale s, which multiplies PB as it is and is not divided by r as "
                "lora_alpha is. The paper uses 0.25 to 0.5 in pretraining and 2 on GLUE; loqt_alpha='auto' follows rank and "
                "width.",
                # past __post_init__, the dataclass and what names the fields
                LoQTWarning,
                stacklevel=5,
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are saved."""
        return {**super().to_dict(), "format_version": FORMAT_VERSION}

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Save as `adapter_config.json`, and call `on_saved`: the model card that PEFT has written is completed so.

        Args: see `PeftConfig.save_pretrained`.
        """
        super().save_pretrained(save_directory, **kwargs)
        for describe in self.on_saved:
            describe(self, save_directory)

    @classmethod
    def paper(cls, size: str, **changes) -> LoQTConfig:
        """The recipe of the paper's pretraining experiments: NF4 W and P, exact singular vectors, gaps of 100 + ⌊1.2^i⌋ steps.

        What the paper sets outside of this config: learning rate 0.01 with 10% warm-up and a cosine to 10%, sequences of 256
        tokens, 131,072 tokens an optimizer step.

        Args:
            size (`str`): `"60m"`, `"130m"`, `"350m"` or `"1b"`, in any case: sets `r`, `loqt_alpha` and `compensation_steps`.
            changes: Fields that differ from the recipe.

        Raises:
            ValueError: If `size` is none of these, or a field has a value that is not allowed.
        """
        key = size.lower() if isinstance(size, str) else size
        if key not in PAPER:
            raise ValueError(f"size={size!r} is not allowed: one of {', '.join(map(repr, PAPER))}.")
        recipe = {
            "task_type": "CAUSAL_LM",
            "full_rank_modules": "all",
            "quantize_weight": "nf4",
            "quantize_projection": "nf4",
            "projection": "svd",
            "update_interval": 100,
            "interval_schedule": "exponential",
            "interval_growth": 1.2,
            **PAPER[key],
        }
        return cls(**{**recipe, **changes})

    @property
    def schedule(self) -> UpdateSchedule:
        """Which optimizer steps are update steps."""
        return UpdateSchedule(self.update_interval, self.interval_schedule, self.interval_growth, self.max_interval)


def _name_the_field(init: Callable) -> Callable:
    @functools.wraps(init)
    def __init__(self, *args, **kwargs):
        for name in sorted(kwargs.keys() - LoQTConfig.__dataclass_fields__.keys()):
            near = difflib.get_close_matches(name, LoQTConfig.__dataclass_fields__, n=1)
            hint = OTHER_NAMES.get(name) or (f"Is it `{near[0]}` that is meant?" if near else "")
            # PEFT, which leaves out what it does not know of a saved config, goes by these words
            raise TypeError(f"LoQTConfig.__init__() got an unexpected keyword argument {name!r}. {hint}".rstrip())
        init(self, *args, **kwargs)

    return __init__


LoQTConfig.__init__ = _name_the_field(LoQTConfig.__init__)  # type: ignore[method-assign]
