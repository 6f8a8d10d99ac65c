"""Leaving LoQT: a dense model, a bitsandbytes 4-bit checkpoint or a LoRA adapter, each loadable without this package."""

from .export import ExportReport, check_output_dir, check_rank, export


__all__ = ["ExportReport", "check_output_dir", "check_rank", "export"]
