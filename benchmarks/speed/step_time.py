"""Processor time of training steps with LoQT, over ranks and rows, against full rank, PEFT's LoRA and DoRA.

    python -m benchmarks.speed.step_time
    python -m benchmarks.speed.step_time --minutes 20     # as far as that takes; the next call goes on from there

Copies of one LLaMA are trained on the same tokens in one process, in turns, on one thread: all parameters with AdamW, and
with 8-bit AdamW that steps each parameter within the backward pass; LoRA, DoRA and LoQT over a base in 4 bits (bitsandbytes
NF4), training only the adapters. Every figure is a median over rounds of a ratio within a round, in which each method takes
one step, in changing order: a machine that slows down for a while slows all of them. Seconds are those of the processor,
which leaves out what else runs on the machine. bfloat16 is autocast.

- **ranks**: ordinary steps at ranks from hidden / 16 to hidden, after LoQT's first update; and an update step, by part.
- **rows**: ordinary steps with few to many tokens, also with LoQT's separate products at every size ("branch").
- **inference**: generation of single tokens and evaluation of a large batch, with the ways chosen and with "branch".

What is measured is kept; `--fresh` starts anew. Results: results/step_time.json, results/step_time.md and, with
matplotlib, results/step_time.png.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from unittest import mock


os.environ.setdefault("OMP_NUM_THREADS", "1")

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.common import RESULTS, llama, markdown_table, provenance, write_json, write_markdown
from loqt_peft import LoQTConfig
from loqt_peft.algorithm import linear_map
from loqt_peft.algorithm.operations import BRANCH, cheapest, operations
from loqt_peft.layers.layer import LoQTLayer
from loqt_peft.training import update as loqt_update
from loqt_peft.training.switching import project_gradient


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FULL, FULL_8BIT, LORA, DORA, LOQT = "full rank", "full rank, 8-bit, per layer", "LoRA", "DoRA", "LoQT"
# sixteenths of the hidden size; 13 is the better recipe's
RANKS = (1, 2, 4, 8, 13, 16)
ROWS = (1, 16, 64, 256, 512, 1024, 2048, 8192)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ALWAYS_BRANCH = mock.patch.object(linear_map, "cheapest", lambda *args, **kwargs: BRANCH)


def base(options, four_bit):
    model = llama(options.hidden, options.layers, options.intermediate, options.vocabulary, heads=8, positions=8192)
    if not four_bit:
        return model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, dtype=torch.float32)


class Run:
    """One method with its optimizer; `dtype` is autocast's unless it is float32."""

    def __init__(self, method, options, dtype, r=0):
        self.dtype, self.steps, self.seconds = dtype, 0, Counter()
        if method in (LORA, DORA):
            config = LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS, use_dora=method == DORA)
        elif method == LOQT:
            # the second step is the first one on packed weights; an update is asked for by the number of the step
            config = LoQTConfig(r=r, target_modules=TARGETS, update_interval=1000, interval_schedule="constant")
        model = base(options, four_bit=method not in (FULL, FULL_8BIT))
        self.model = model if method in (FULL, FULL_8BIT) else get_peft_model(model, config)
        self.model.train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer, self.loqt = None, method == LOQT
        if method == FULL_8BIT:
            for parameter in trained:
                stepped = bnb.optim.AdamW8bit([parameter], lr=1e-4)
                parameter.register_post_accumulate_grad_hook(lambda _, stepped=stepped: _step(stepped))
        else:
            self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def layers(self):
        return [(name, module) for name, module in self.model.named_modules() if isinstance(module, LoQTLayer)]

    def _timed(self, part, function):
        def timed(*args):
            start = time.process_time()
            result = function(*args)
            self.seconds[part] += time.process_time() - start
            return result

        return timed

    def autocast(self):
        return torch.autocast("cpu", dtype=self.dtype, enabled=self.dtype != torch.float32)

    def step(self, tokens, update=False):
        """Seconds of a step, all in all and by part."""
        self.seconds.clear()
        self.steps += 1
        start = time.process_time()
        if self.loqt:
            # P is made by the function that begin_step finds
            with mock.patch.object(loqt_update, "project_gradient", self._timed("projection", project_gradient)):
                self.model.begin_step(1000 * self.steps if update else 1000 * self.steps + 1, lambda: True)
        with self.autocast():
            loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        if self.loqt:
            stepped = time.process_time()
            self.model.end_step(self.optimizer)
            self.seconds["switch"] = time.process_time() - stepped
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        self.seconds["all"] = time.process_time() - start
        return Counter(self.seconds)


def _step(optimizer):
    optimizer.step()
    optimizer.zero_grad()


def tokens_of(rows, options):
    length = min(rows, options.length)
    return torch.randint(options.vocabulary, (max(rows // length, 1), length))


def median(values):
    return statistics.median(values)


def quartiles(values):
    values = sorted(values)
    return [values[len(values) // 4], median(values), values[(3 * len(values)) // 4]]


def in_turns(actions, rounds):
    """Of each of the named actions what it returned, by round; their order changes. The first round is not counted."""
    names, found = list(actions), []
    for number in range(rounds + 1):
        first = number % len(names)
        found.append({name: actions[name]() for name in names[first:] + names[:first]})
    return found[1:]


###############################
# What is measured
###############################


def measure_rank(options, dtype, r, rows):
    """Ordinary steps of all methods and an update step of LoQT, in steps at full rank and in ordinary steps."""
    tokens = tokens_of(rows, options)
    runs = {method: Run(method, options, DTYPES[dtype], r) for method in (FULL, FULL_8BIT, LORA, DORA, LOQT)}
    runs[LOQT].step(tokens, update=True)
    actions = {method: (lambda run=run: run.step(tokens)) for method, run in runs.items()}
    actions["update"] = lambda: runs[LOQT].step(tokens, update=True)
    found = in_turns(actions, options.rounds)
    result = {
        "full_rank_seconds": median(row[FULL]["all"] for row in found),
        "of_full_rank": {
            method: quartiles(row[method]["all"] / row[FULL]["all"] for row in found)
            for method in (FULL_8BIT, LORA, DORA, LOQT)
        },
        "of_lora": quartiles(row[LOQT]["all"] / row[LORA]["all"] for row in found),
        "update": quartiles(row["update"]["all"] / row[LOQT]["all"] for row in found),
    }
    for part in ("projection", "switch"):
        result[f"update_{part}"] = median(row["update"][part] / row[LOQT]["all"] for row in found)
    # the weights' gradients, in so far as they cost more than B's
    result["update_gradients"] = result["update"][1] - 1 - result["update_projection"] - result["update_switch"]
    return result


def measure_rows(options, dtype, r, rows):
    """Ordinary steps of LoQT with a number of rows, in steps at full rank, also with separate products."""
    tokens, repeats = tokens_of(rows, options), max(1, 256 // rows)
    loqt, full = Run(LOQT, options, DTYPES[dtype], r), Run(FULL, options, DTYPES[dtype])
    loqt.step(tokens_of(512, options), update=True)

    def steps(run):
        return sum(run.step(tokens)["all"] for _ in range(repeats))

    def separate():
        with ALWAYS_BRANCH:
            return steps(loqt)

    found = in_turns({LOQT: lambda: steps(loqt), "branch": separate, FULL: lambda: steps(full)}, options.rounds)
    layers = [layer for _, layer in loqt.layers()]
    return {
        "ways": dict(Counter(cheapest(rows, layer.shape, layer.r["default"]) for layer in layers)),
        "of_full_rank": quartiles(row[LOQT] / row[FULL] for row in found),
        "branch_of_full_rank": quartiles(row["branch"] / row[FULL] for row in found),
        "of_branch": quartiles(row[LOQT] / row["branch"] for row in found),
    }


@torch.no_grad()
def measure_inference(options, dtype, r, rows):
    """Generation with batch 1 and evaluation with batch 64, against separate products."""
    run = Run(LOQT, options, DTYPES[dtype], r)
    with torch.enable_grad():
        run.step(tokens_of(512, options), update=True)
    run.model.eval()
    prompt, batch = torch.randint(options.vocabulary, (1, 8)), torch.randint(options.vocabulary, (64, rows // 64))

    def generate():
        run.model.generate(input_ids=prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False, use_cache=True)

    def evaluate():
        run.model(input_ids=batch, labels=batch)

    def timed(function, context):
        start = time.process_time()
        with context, run.autocast():
            function()
        return time.process_time() - start

    result = {}
    for name, function in (("generation", generate), ("evaluation", evaluate)):
        actions = {
            "chosen": lambda function=function: timed(function, contextlib.nullcontext()),
            "branch": lambda function=function: timed(function, ALWAYS_BRANCH),
        }
        result[name] = quartiles(row["chosen"] / row["branch"] for row in in_turns(actions, options.rounds))
    return result


MEASURES = {"ranks": measure_rank, "rows": measure_rows, "inference": measure_inference}


def settings(options):
    """What there is to measure, the most telling first: (part, dtype, rank, rows)."""
    most = options.rows[-1]
    ranks = [max(1, options.hidden * part // 16) for part in RANKS]
    chosen = [max(1, options.hidden * part // 16) for part in (4, 13)]
    for dtype in options.dtypes:
        yield from (("ranks", dtype, r, most) for r in sorted(ranks, key=lambda r: r not in (*chosen, options.hidden)))
        yield from (("inference", dtype, r, most) for r in chosen)
    for dtype in options.dtypes:
        yield from (("rows", dtype, r, rows) for r in chosen for rows in options.rows)


def relative_operations(method, options, r, rows):
    """Floating operations of a step by those of one at full rank, attention and head included."""
    h, i = options.hidden, options.intermediate
    shapes = [(h, h)] * 4 + [(i, h)] * 2 + [(h, i)]

    def layer(method, out, inner):
        if method == FULL:
            return 6 * rows * out * inner
        if method == LOQT:
            return min(operations(rows, (out, inner), min(r, h)).values())
        return 4 * rows * out * inner + 6 * rows * r * (out + inner)

    def whole(method):
        attention = 3 * 4 * rows * min(rows, options.length) * h
        # the head is frozen beside adapters
        head = (6 if method == FULL else 4) * rows * h * options.vocabulary
        return options.layers * (sum(layer(method, *shape) for shape in shapes) + attention) + head

    return whole(method) / whole(FULL)


###############################
# Tables and figure
###############################


def of(values):
    low, middle, high = values
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def write(options, found):
    write_json("step_time.json", {"options": settings_of(options), "results": found})
    rows = {part: [] for part in MEASURES}
    for part, dtype, r, n in settings(options):
        if (result := found.get(f"{part} {dtype} {r} {n}")) is None:
            continue
        own = [dtype, r]
        if part == "ranks":
            ratios = [of(result["of_full_rank"][method]) for method in (LOQT, LORA, DORA, FULL_8BIT)]
            parts = [f"{result[f'update_{name}']:.2f}" for name in ("gradients", "projection", "switch")]
            counted = f"{relative_operations(LOQT, options, r, n):.2f}"
            own += [ratios[0], counted, *ratios[1:], of(result["of_lora"]), of(result["update"]), *parts]
        elif part == "rows":
            ways = ", ".join(result["ways"])
            own += [n, ways, of(result["of_full_rank"]), of(result["branch_of_full_rank"]), of(result["of_branch"])]
        else:
            own += [of(result["generation"]), of(result["evaluation"])]
        rows[part].append(own)
    headers = {
        "ranks": ("dtype", "r", "LoQT", "its operations", "LoRA", "DoRA", "full rank, 8-bit, per layer", "LoQT / LoRA")
        + ("update / ordinary step", "of it gradients", "projection", "switch"),
        "rows": ("dtype", "r", "rows", "ways", "LoQT", "branch", "LoQT / branch"),
        "inference": ("dtype", "r", "generation, chosen / branch", "evaluation, chosen / branch"),
    }
    titles = {
        "ranks": f"{options.rows[-1]} tokens a step; an ordinary step in steps of full-rank AdamW. The parts of an update "
        "step come on top of an ordinary one, in ordinary steps.",
        "rows": "An ordinary step in steps of full-rank AdamW with as many rows. Branch: separate products at every size.",
        "inference": "Generation of 64 tokens with batch 1; evaluation with batch 64.",
    }
    text = ["# Step time\n"]
    text += [
        f"LLaMA, hidden {options.hidden}, MLP {options.intermediate}, {options.layers} layers, one thread, processor"
    ]
    text += [f"time; medians of ratios within a round (quartiles), {options.rounds} rounds.\n"]
    if any(row for row in rows["ranks"]) and draw(options, found):
        text += ["![Cost over rank](step_time.png)\n"]
    for part in MEASURES:
        if rows[part]:
            text += [f"## {part.capitalize()}\n", titles[part] + "\n", markdown_table(headers[part], rows[part])]
    write_markdown("step_time.md", "\n".join([*text, provenance()]))


def draw(options, found):
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = options.rows[-1]
    figure, axes = pyplot.subplots(1, len(options.dtypes), figsize=(5.5 * len(options.dtypes), 4), squeeze=False)
    for axis, dtype in zip(axes[0], options.dtypes, strict=True):
        measured = sorted(
            (r, found[key])
            for part, name, r, n in settings(options)
            if part == "ranks" and name == dtype and (key := f"{part} {name} {r} {n}") in found
        )
        for method, color in ((LOQT, "C0"), (LORA, "C1"), (DORA, "C2"), (FULL_8BIT, "C3")):
            medians = [result["of_full_rank"][method][1] for _, result in measured]
            axis.plot([r for r, _ in measured], medians, "o-", color=color, label=method)
        ranks = range(1, options.hidden + 1)
        for method, color in ((LOQT, "C0"), (LORA, "C1")):
            counted = [relative_operations(method, options, r, rows) for r in ranks]
            axis.plot(ranks, counted, ":", color=color, label=f"{method}, floating operations")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=dtype, xlabel="rank", ylabel="step / step of full-rank AdamW", ylim=(0, 3))
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(RESULTS / "step_time.png", dpi=110)
    pyplot.close(figure)
    return True


###############################
# Command line
###############################


def settings_of(options):
    """What figures depend on."""
    return {k: v for k, v in vars(options).items() if k not in ("minutes", "fresh")}


def earlier(options):
    path = RESULTS / "step_time.json"
    if options.fresh or not path.exists():
        return {}
    held = json.loads(path.read_text())
    return held["results"] if held["options"] == settings_of(options) else {}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1376)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=list(ROWS), help="tokens; ranks are compared at the last"
    )
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so long")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found, start = earlier(options), time.monotonic()
    for setting in settings(options):
        key = " ".join(map(str, setting))
        if key in found:
            continue
        if time.monotonic() - start > 60 * options.minutes:
            break
        part, *rest = setting
        found[key] = MEASURES[part](options, *rest)
        print(key, json.dumps(found[key]), flush=True)
        write(options, found)
    write(options, found)
    print("\n" + (RESULTS / "step_time.md").read_text())


if __name__ == "__main__":
    main()
