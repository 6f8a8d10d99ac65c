"""What an update step of several processes holds, and what becomes of it when they differ, fail or end."""

import math
import os
import random
import socket
import subprocess
import sys

import pytest
from common import TESTS

from loqt_peft.training.ownership import owners, rounds


LLAMA_7B = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8, 64])
def test_owners_hold_equal_shares_and_work_at_equal_times(processes):
    shapes = LLAMA_7B * 32
    sizes = [math.prod(shape) for shape in shapes]
    owner = owners(shapes, processes)
    loads = [
        sum(size for size, rank in zip(sizes, owner, strict=True) if rank == process) for process in range(processes)
    ]
    assert max(loads) <= sum(sizes) / processes + max(sizes)
    assert processes > 8 or max(loads) <= 1.02 * sum(sizes) / processes

    found = rounds(shapes, processes)
    assert sorted(place for group in found for place, _ in group) == list(range(len(shapes)))
    assert all(owner[place] == rank for group in found for place, rank in group)
    assert all(len({rank for _, rank in group}) == len(group) for group in found)
    longest = sum(max(sizes[place] for place, _ in group) for group in found)
    assert processes > 8 or longest <= 1.05 * sum(sizes) / processes


def test_owners_of_layers_of_any_sizes_hold_no_more_than_a_layer_beyond_their_share():
    numbers = random.Random(0)
    for _ in range(20):
        shapes = [(numbers.randint(1, 50), numbers.randint(1, 50)) for _ in range(numbers.randint(1, 40))]
        processes = numbers.randint(1, 9)
        sizes, owner = [math.prod(shape) for shape in shapes], owners(shapes, processes)
        loads = [sum(size for size, rank in zip(sizes, owner, strict=True) if rank == i) for i in range(processes)]
        assert max(loads) <= sum(sizes) / processes + max(sizes)


def start(worker, rank, size, port):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return subprocess.Popen(
        [sys.executable, worker],
        cwd=TESTS,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_processes_that_differ_or_fail_do_not_hang_or_harm_each_other():
    port = free_port()
    processes = [start("processes_worker.py", rank, 2, port) for rank in range(2)]
    try:
        outputs = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    # the second one ends itself in the last check
    assert processes[1].returncode == 9, outputs[1][-3000:]
    assert processes[0].returncode == 0 and "all checks passed" in outputs[0], outputs[0][-3000:]
