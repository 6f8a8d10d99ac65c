"""Processes that meet over gloo. They are forked from a server that has imported everything once: a start costs no seconds."""

import multiprocessing
import os
import pickle
import socket
import sys
import traceback
from multiprocessing.connection import wait

import torch


PRELOADED = ["fsdp_worker"]


def _free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def _work(connection, rank, world, port, function, args):
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
    )
    torch.set_num_threads(1)
    try:
        connection.send_bytes(pickle.dumps((True, function(*args))))
    except BaseException:
        connection.send_bytes(pickle.dumps((False, traceback.format_exc())))
    connection.close()
    sys.stdout.flush()
    sys.stderr.flush()
    # as in ddp_worker.py
    os._exit(0)


def run(world, function, *args, timeout=240, dying=()):
    """What `function(*args)` returns in each of `world` processes, in order of their ranks; of `dying` ones `None`.

    The first error of any process is raised, and the others are ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port, connections, processes = _free_port(), [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(theirs, rank, world, port, function, args))
        process.start()
        theirs.close()
        connections.append(ours)
        processes.append(process)
    results = dict.fromkeys(dying)
    try:
        while len(results) < world:
            ready = wait([c for rank, c in enumerate(connections) if rank not in results], timeout)
            assert ready, f"processes {sorted(set(range(world)) - set(results))} did not end within {timeout} s"
            for connection in ready:
                rank = connections.index(connection)
                good, result = pickle.loads(connection.recv_bytes())
                assert good, f"process {rank}:\n{result}"
                results[rank] = result
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [results[rank] for rank in range(world)]
