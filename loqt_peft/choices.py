"""What settings may be. Nothing is imported here, so that the command line can name them at once."""

QUANT_TYPES = ("nf4", "fp4")
# of P: those that are made from the gradient, and all
OF_GRADIENT = ("svd", "eigh", "randomized")
PROJECTIONS = (*OF_GRADIENT, "random")
INTERVAL_SCHEDULES = ("exponential", "linear", "constant")
OPTIMIZER_STATES = ("keep", "reset", "rotate")
RETAIN_BASE = ("device", "cpu", "drop")
UPDATE_MODES = ("backward", "stagger", "whole")

EXPORT_FORMATS = ("dense", "bnb-4bit", "qlora", "lora")

# of a memory estimate
ESTIMATED_METHODS = ("loqt", "loqt-nq", "lora", "qlora", "galore", "full")
ESTIMATED_OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit")
ESTIMATED_PROJECTIONS = ("randomized", "random")
BASES = ("4bit", "dense")

DTYPES = ("bfloat16", "float16", "float32")
