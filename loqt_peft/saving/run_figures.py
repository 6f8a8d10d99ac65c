"""What a model card says of the run that made an adapter: from the state of the Trainer that is saving it."""

from __future__ import annotations

import sys
from typing import Any

from ..compat import calling_objects


def run_figures() -> dict[str, str]:
    """Figures of the Trainer that is saving, in words; none where no Trainer is."""
    # nobody hands a config the Trainer, and whoever has none needs no import of it
    module = sys.modules.get("transformers.trainer")
    if module is None:
        return {}
    trainer = next((trainer for trainer, _, _ in calling_objects(module.Trainer)), None)
    return {} if trainer is None or not trainer.state.global_step else figures_of_trainer(trainer)


def figures_of_trainer(trainer: Any) -> dict[str, str]:
    """What its state, its arguments and its data say.

    Args:
        trainer (`transformers.Trainer`): Whose training has begun.
    """
    state, args = trainer.state, trainer.args
    found: dict[str, str] = {}
    data = _data(trainer.train_dataset)
    if data:
        found["Trained on"] = data
    epochs = "" if state.epoch is None else f" ({state.epoch:.2f} epochs)"
    found["Steps"] = f"{state.global_step:,}{epochs}, {_batch(args)} sequences each"
    found["Learning rate"] = (
        f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}"
    )
    found["Optimizer"] = str(getattr(args.optim, "value", args.optim))
    for name, key, form in (
        ("Training loss, last logged", "loss", "{:.4f}"),
        ("Evaluation loss", "eval_loss", "{:.4f}"),
        ("Tokens per second", "loqt/tokens_per_second", "{:,.0f}"),
    ):
        value = next((entry[key] for entry in reversed(state.log_history) if key in entry), None)
        if value is not None:
            found[name] = form.format(value)
    peaks = ("loqt/peak_memory_reserved", "loqt/peak_resident_memory")
    memory = [entry[key] for entry in state.log_history for key in peaks if key in entry]
    if memory:
        found["Peak memory"] = f"{max(memory) / 2**20:,.0f} MiB"
    return found


def _batch(args: Any) -> int:
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size * max(1, args.n_gpu)


def _data(dataset: Any) -> str:
    """The name of a data set of `datasets`, and how many examples there are."""
    info = getattr(dataset, "info", None)
    # what is read from files is named after its format, which says nothing
    name = getattr(info, "dataset_name", None) if getattr(info, "download_checksums", None) else None
    size = f"{len(dataset):,} examples" if hasattr(dataset, "__len__") else ""
    return ", ".join(part for part in (name, size) if part)
