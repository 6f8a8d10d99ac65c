"""The device of these tests: CUDA, or the CPU in its place with `LOQT_TEST_DEVICE=cpu`."""

import os
from contextlib import nullcontext

import pytest
import torch


DEVICE = os.environ.get("LOQT_TEST_DEVICE", "cuda")
on_cuda = DEVICE == "cuda"
needs_device = pytest.mark.skipif(
    on_cuda and not torch.cuda.is_available(), reason="no CUDA device; LOQT_TEST_DEVICE=cpu takes the CPU in its place"
)


def synchronize():
    if on_cuda:
        torch.cuda.synchronize()


def sleep(cycles=10**9):
    """A kernel that only waits, by default about half a second, and with it all that is queued after it."""
    if on_cuda:
        torch.cuda._sleep(cycles)


def another_stream():
    return torch.cuda.stream(torch.cuda.Stream()) if on_cuda else nullcontext()
