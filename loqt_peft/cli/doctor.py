"""`loqt doctor`: versions, devices, what an adapter holds, and what there is to mend."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..health import Health


def add_doctor_parser(commands: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "doctor",
        help="say whether everything is in order, for you or for a bug report",
        description="Print versions and devices; with ADAPTER also what it holds, whether it is whole and fits its base "
        "model, how its run went, and what there is to mend. Exits with 1 if there is something.",
    )
    parser.add_argument(
        "adapter", nargs="?", metavar="ADAPTER", help="folder or Hub name of an adapter, or a checkpoint"
    )
    parser.add_argument("--base-model", help="folder or Hub name of the base model (default: what the adapter names)")
    parser.add_argument("--revision", help="branch, tag or commit of the adapter")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.set_defaults(run=doctor_command)


def doctor_command(options: argparse.Namespace) -> int:
    """Print what was found; 1 if there is something to mend."""
    from ..health import Health, devices, versions

    if options.adapter is None:
        health = Health(versions(), devices())
    else:
        health = examine(options.adapter, options.base_model, options.revision)
    print(health.to_json() if options.json else health)
    return 0 if health.in_order else 1


def examine(adapter: str, base_model: str | None = None, revision: str | None = None) -> Health:
    """What is to be said of a saved adapter, its base model and its run.

    Args:
        adapter (`str`): Folder or Hub name.
        base_model (`str`, *optional*): Folder or Hub name of the base model; what the adapter names if `None`.
        revision (`str`, *optional*): Branch, tag or commit of the adapter on the Hub.

    Raises:
        ValueError: If it is no LoQT adapter.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    from ..findings import Finding
    from ..health import Health, devices, run_findings, saved_findings, versions
    from .adapter import load_base, load_config, trained_quantization

    config = load_config(adapter, revision)
    found = run_findings(adapter) + saved_findings(config)
    described = {"name": adapter, "base model": config.base_model_name_or_path, "updates": str(config.num_updates)}
    health = Health(versions(), devices(), described, findings=found)

    def ill(code: str, what: str, remedy: str) -> Health:
        return replace(health, findings=[Finding("error", code, what, remedy), *found])

    base = base_model or config.base_model_name_or_path
    if not base:
        return ill(
            "base_without_name",
            "The adapter does not say what its base model is, and it is a change of it.",
            "Save the base model, and say where it is with --base-model.",
        )
    try:
        model = load_base(config, base, quantization_config=trained_quantization(adapter, revision))
    except (OSError, ValueError, SafetensorError) as error:
        return ill("not_loaded", f"{' '.join(str(error).split())}", "Save or download again what cannot be read.")
    try:
        model = PeftModel.from_pretrained(model, adapter, revision=revision)
    except (OSError, ValueError, SafetensorError) as error:
        return ill(
            "not_verified", str(error), "Take an adapter that was saved whole, and the base that it was made for."
        )
    live = Health.of(model)
    return replace(
        health, adapter={**live.adapter, "name": adapter}, weights=live.weights, findings=found + live.findings
    )
