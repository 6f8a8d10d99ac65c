"""What leans on private parts of PEFT, transformers, torch and bitsandbytes, and the version in which each was read.

tests/test_compat.py fails when one of them changes.
"""

from __future__ import annotations

import torch


def is_in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread (torch 2.6 to 2.13)."""
    return torch._C._current_graph_task_id() != -1
