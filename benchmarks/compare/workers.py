"""The queue: runs side by side, each result written as soon as it is there."""

import multiprocessing
import os
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from multiprocessing import parent_process
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from benchmarks.compare import results, training
from benchmarks.compare.plan import Plan
from benchmarks.compare.settings import key_of


class Workers:
    """Runs specs side by side, each worker a process of its own that lives until it crashes or the harness ends."""

    def __init__(self, count: int, blocks: Path, logs: Path):
        self.threads = ThreadPoolExecutor(count)
        self.local = threading.local()
        self.blocks, self.logs = blocks, logs
        self.processes: list[ProcessPoolExecutor] = []

    def close(self, now: bool = False) -> None:
        """End the processes, `now` or when their runs have ended."""
        self.threads.shutdown(wait=not now, cancel_futures=True)
        if now:
            for child in multiprocessing.active_children():
                child.terminate()
        for process in self.processes:
            process.shutdown()

    def submit(self, spec: dict) -> Future:
        return self.threads.submit(self._run, spec)

    def log(self, spec: dict) -> Path:
        return self.logs / f"{key_of(spec)}.log"

    def _run(self, spec: dict) -> dict:
        process = getattr(self.local, "process", None)
        if process is None:
            context = multiprocessing.get_context("spawn")
            process = self.local.process = ProcessPoolExecutor(1, context, initializer=start_worker)
            self.processes.append(process)
        try:
            return process.submit(run_in_worker, spec, self.blocks, self.log(spec)).result()
        except Exception:
            # after a crash the pool is broken; after an error it may hold memory
            self.local.process = None
            process.shutdown(wait=False)
            raise


def name_of(spec: dict) -> str:
    return f"{spec['method']} lr {spec['lr']:g} seed {spec['seed']} ({key_of(spec)})"


def report_failure(spec: dict, error: BaseException, log: Path) -> None:
    lines = log.read_text(errors="replace").splitlines()[-20:] if log.exists() else []
    print(
        "\n".join([f"failed: {name_of(spec)}: {type(error).__name__}: {error}", f"the end of {log}:", *lines]),
        file=sys.stderr,
        flush=True,
    )


def run_all(plans: list[Plan], path: Path, workers) -> list[dict]:
    """Run what the plans need and is not done, write each result when it is there, and return the specs that failed.

    Args:
        plans (`list[Plan]`): What is needed.
        path (`Path`): The file of results.
        workers ([`Workers`]): Where runs are submitted.
    """
    done = results.read(path)
    pending: dict[Future, dict] = {}
    asked_for: set[str] = set()
    failed: list[dict] = []

    def submit() -> None:
        for plan in plans:
            for spec in plan.known(done):
                key = key_of(spec)
                if key not in done and key not in asked_for:
                    asked_for.add(key)
                    pending[workers.submit(spec)] = spec

    def expected() -> set[str]:
        return set().union(*(plan.expected(done) for plan in plans))

    keys = expected()
    with tqdm(total=len(keys), initial=len(keys & done.keys()), unit="run", smoothing=0, file=sys.stdout) as bar:
        submit()
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                spec = pending.pop(future)
                try:
                    run = future.result()
                except Exception as error:  # of the run, whatever it was; the others go on
                    failed.append(spec)
                    report_failure(spec, error, workers.log(spec))
                else:
                    results.append(path, run)
                    done[key_of(run["spec"])] = run
                    figure = "diverged" if run["diverged"] else f"loss {run['loss']:.4f}"
                    bar.write(f"{name_of(spec)}: {figure}, {run['seconds']:.0f} s", file=sys.stdout)
                bar.update()
            submit()
            bar.total = len(expected() | asked_for)
            bar.refresh()
    return failed


###############################
# In a worker process
###############################


def start_worker() -> None:
    """Of a worker that the harness started: it ends when the harness does, however that ended."""

    def watch():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def run_in_worker(spec: dict, blocks: Path, log: Path) -> dict:
    """[`training.run`] on the token blocks in a file; what it prints goes to `log`, also if the process dies of it."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    parts = load_file(blocks)
    try:
        return training.run(spec, parts["training"], parts["validation"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
