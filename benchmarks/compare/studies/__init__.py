"""A study is a file here: `variants(size, device_bytes)` gives the rows of its table, [`Variant`]s that are run and compared.

`STEPS`, if a study has it, is how many times as many steps its runs take as the size says.
"""

from types import ModuleType

from benchmarks.compare.studies import (
    compensation,
    equal_bytes,
    gaps,
    long,
    methods,
    micro_batches,
    optimizer_state,
    projection,
    quantization,
    rank,
    recipe,
    rest,
    scale,
    update_mode,
)


MODULES = (
    methods,
    compensation,
    gaps,
    quantization,
    rank,
    scale,
    projection,
    optimizer_state,
    update_mode,
    micro_batches,
    equal_bytes,
    recipe,
    rest,
    long,
)
STUDIES: dict[str, ModuleType] = {module.__name__.rpartition(".")[2]: module for module in MODULES}
