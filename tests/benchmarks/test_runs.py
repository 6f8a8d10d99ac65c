"""benchmarks/pretraining: what is run, kept, counted and tabled."""

import hashlib
import json
import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Namespace

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file


sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.pretraining import compare, methods, report, results, settings, text, training
from benchmarks.pretraining.errors import CompareError
from benchmarks.pretraining.relora import merge_and_restart, relora_schedule
from benchmarks.pretraining.settings import (
    LOQT,
    METHODS,
    NAMES,
    SIZES,
    STUDIES,
    Variant,
    key_of,
    make_spec,
    with_feedback,
)
from loqt_peft import LoQTConfig
from loqt_peft.update import loqt_layers


TINY = SIZES["tiny"]
BY_METHOD = {variant.method: variant for variant in METHODS}


def tiny_spec(variant=LOQT, lr=0.003, seed=0, steps=3):
    return make_spec(variant, "tiny", lr, seed, steps, "text", "float32", "cpu")


def tokens(blocks, seed=0):
    return torch.randint(TINY.vocabulary, (blocks, TINY.length), generator=torch.Generator().manual_seed(seed))


def tiny_model():
    return training.llama(
        TINY.hidden, TINY.layers, TINY.intermediate, TINY.vocabulary, heads=TINY.heads, positions=TINY.length
    )


def run_tiny(spec, blocks=40):
    return training.run(spec, tokens(blocks), tokens(16, seed=1))


def trained_model(spec):
    """The model of a run, and its result."""
    trained = {}

    class Keep(training.ByteCounter):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            super().on_train_end(args, state, control, model=model, **kwargs)
            trained["model"] = model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "ByteCounter", Keep)
        found = run_tiny(spec)
    return trained["model"], found


def made_up(spec, loss=None, diverged=False):
    """A result, without training: the loss is a function of the spec."""
    loss = len(key_of(spec)) + int(key_of(spec), 16) % 1000 / 1000 if loss is None else loss
    return {
        "spec": spec,
        "loss": None if diverged else loss,
        "perplexity": None if diverged else math.exp(loss),
        "diverged": diverged,
        "steps": spec["steps"],
        "curve": [[1, loss + 1], [spec["steps"], loss]],
        "updates": [
            {
                "step": step,
                **dict.fromkeys(training.UPDATE_FIGURES, 0.1),
                "loss_before": 5.0,
                "loss_after": 5.0 + step / 8 * (1 + spec["seed"]),
            }
            for step in (1, 2, 6)
        ],
        "bytes": {"weights": 1000, "gradients": 200, "optimizer": 30, "host": 4},
        "tokens_per_second": 100.0 + spec["seed"],
        "seconds": 1.0,
        "epochs": 0.5,
        "batches": str(spec["seed"]),
        "versions": {"python": "3"},
        "machine": {"processor": "p", "cores": 2, "threads": 1, "device": "cpu"},
    }


class Inline:
    """Workers that run in this process, at once, and note what they ran."""

    def __init__(self, answer=made_up):
        self.answer = answer
        self.specs = []

    def submit(self, spec):
        self.specs.append(spec)
        future = Future()
        try:
            future.set_result(self.answer(spec))
        except Exception as error:
            future.set_exception(error)
        return future

    def log(self, spec):
        return Path("no such log")

    def close(self, now=False):
        pass


def plan_of(variants, seeds=(0, 1, 2), rates=(0.001, 0.002, 0.004), steps=10):
    def spec(variant, rate, seed):
        return tiny_spec(variant, rate, seed, steps)

    return compare.Plan("methods", list(variants), spec, list(seeds), rates, "tiny", steps)


###############################
# What is run
###############################


def test_interrupted_anywhere_it_goes_on_where_it_was(tmp_path, monkeypatch):
    whole = Inline()
    compare.run_all([plan_of(METHODS)], tmp_path / "whole.jsonl", whole)
    expected = {key_of(spec) for spec in whole.specs}
    # 3 rates with the first seed, the best with two more
    assert len(expected) == len(whole.specs) == len(METHODS) * (3 + 2)
    # what the progress bar counts, before any rate is known and after
    assert len(plan_of(METHODS).expected({})) == len(expected)
    assert plan_of(METHODS).expected(results.read(tmp_path / "whole.jsonl")) == expected

    path, written = tmp_path / "cut.jsonl", []

    def append(path, run):
        if len(written) % 5 == 4:
            written.append(None)
            raise KeyboardInterrupt
        written.append(key_of(run["spec"]))
        results.append(path, run)

    monkeypatch.setattr(compare, "results", Namespace(append=append, read=results.read))
    interrupts = 0
    while True:
        workers, before = Inline(), set(results.read(path))
        try:
            assert compare.run_all([plan_of(METHODS)], path, workers) == []
            break
        except KeyboardInterrupt:
            interrupts += 1
        assert not before & {key_of(spec) for spec in workers.specs}
    assert interrupts > 5
    assert results.read(path).keys() == expected
    assert sorted(filter(None, written)) == sorted(expected)
    again = Inline()
    compare.run_all([plan_of(METHODS)], path, again)
    assert again.specs == []


def test_the_best_rate_is_repeated_and_no_diverged_one(tmp_path):
    losses = {0.001: 3.0, 0.002: 2.0, 0.004: 1.0}

    def answer(spec):
        return made_up(spec, losses[spec["lr"]], diverged=spec["lr"] == 0.004)

    workers = Inline(answer)
    compensated = Variant("K = 0", "loqt", {"compensation_steps": 0})
    plan = plan_of([BY_METHOD["full"], compensated])
    compare.run_all([plan], tmp_path / "runs.jsonl", workers)
    by_kind = {}
    for spec in workers.specs:
        kind = spec["method"] if spec["fields"].get("compensation_steps") != 0 else "ablation"
        by_kind.setdefault(kind, set()).add((spec["lr"], spec["seed"]))
    grid = {(0.001, 0), (0.002, 0), (0.004, 0)}
    assert by_kind["full"] == grid | {(0.002, 1), (0.002, 2)}
    # an ablation runs at LoQT's best rate, for which LoQT's grid is run
    assert by_kind["loqt"] == grid
    assert by_kind["ablation"] == {(0.002, 0), (0.002, 1), (0.002, 2)}


def test_a_method_that_always_diverges_is_told_so(tmp_path):
    path = tmp_path / "runs.jsonl"
    plan = plan_of([BY_METHOD["full"], LOQT])
    compare.run_all([plan], path, Inline(lambda spec: made_up(spec, diverged=spec["method"] == "full")))
    lines = report.table(plan, results.read(path)).splitlines()
    assert "diverged at every rate" in next(line for line in lines if line.startswith("| full-rank"))
    assert [line for line in lines if line.startswith("| full-rank") and line.endswith("diverged |")]
    assert len(results.read(path)) == 3 + 5


def device_bytes(variant):
    """GaLore needs 1000; LoQT 160 for each direction, and 90 with 8-bit moments; 40 of them for gradients."""
    if variant.method == "galore":
        return 1000
    each = (90 if variant.optim == "adamw_bnb_8bit" else 160) - 40 * variant.per_layer
    return each * variant.fields.get("r", TINY.rank)


def test_every_study_has_valid_runs_and_shares_loqts_own(tmp_path):
    base = key_of(tiny_spec(LOQT))
    shared = set()
    for name, study in STUDIES.items():
        variants = study(TINY, device_bytes)
        specs = [tiny_spec(variant) for variant in variants]
        assert len({variant.name for variant in variants}) == len({key_of(spec) for spec in specs}) == len(variants)
        for spec in specs:
            assert json.loads(json.dumps(spec)) == spec
            assert spec["batch"] % spec["micro_batches"] == 0
        if base in map(key_of, specs):
            shared.add(name)
    # P from all micro-batches of several is another run than with one; ranks are parts of the hidden size
    assert shared == set(STUDIES) - {"micro_batches"}
    large = [
        make_spec(v, "60m", 0.01, 0, 10, "text", "float32", "cpu")
        for v in STUDIES["micro_batches"](SIZES["60m"], None)
    ]
    assert key_of(make_spec(LOQT, "60m", 0.01, 0, 10, "text", "float32", "cpu")) in map(key_of, large)


def test_only_the_rows_asked_for_are_run_with_what_decides_on_their_rate(tmp_path):
    compensated = Variant("K = 0", "loqt", {"compensation_steps": 0})
    plans = [plan_of([BY_METHOD["full"], compensated]), plan_of([LOQT])]
    workers = Inline()
    compare.run_all(compare.only_rows(plans, ["K = 0"]), tmp_path / "runs.jsonl", workers)
    specs = [spec for spec in workers.specs if spec["fields"].get("compensation_steps") != 0]
    assert {spec["method"] for spec in workers.specs} == {"loqt"}
    assert len(specs) == 3 and len(workers.specs) == 6
    with pytest.raises(CompareError, match=r"--rows \['K = 1'\]: .*'K = 0', 'LoQT'"):
        compare.only_rows(plans, ["LoQT", "K = 1"])


def test_a_row_with_rates_of_its_own_is_searched_at_these(tmp_path):
    workers = Inline()
    plan = plan_of([replace(LOQT, rates=(0.5, 0.25))])
    plan.rates = None
    compare.run_all([plan], tmp_path / "runs.jsonl", workers)
    assert {spec["lr"] for spec in workers.specs if spec["seed"] == 0} == {0.5, 0.25}
    plan.rates = (0.125,)
    assert [spec["lr"] for spec in plan.grid(plan.variants[0])] == [0.125]


# in units of hidden / 16 = 2
@pytest.mark.parametrize(
    "study, largest, freeing", [("equal_bytes", 10, set()), ("recipe", 14, {18, 24}), ("long", 14, {24})]
)
def test_8_bit_moments_come_with_the_largest_rank_that_fits(study, largest, freeing):
    asked = []
    variants = STUDIES[study](TINY, lambda variant: asked.append(variant) or device_bytes(variant))
    found = {(v.fields["r"], v.per_layer) for v in variants if v.optim == "adamw_bnb_8bit"}
    assert found - {(TINY.rank, False)} == {(largest, False)} | {(r, True) for r in freeing}
    assert len(asked) <= 6 + 5 * len(freeing)


def test_s_that_fits_moves_w_as_much_at_every_rank_and_in_proportion_to_the_width():
    for hidden in (32, 512):
        size = replace(TINY, hidden=hidden)
        fields = [settings.fitted(Variant("", "loqt", {"r": r}), size).fields for r in (2, 8, 32)]
        assert [f["loqt_alpha"] * math.sqrt(f["r"] / hidden) for f in fields] == pytest.approx(
            [16 / hidden] * 3, rel=1e-2
        )
    # what the package calls "auto"
    model = get_peft_model(tiny_model(), LoQTConfig(r=8, loqt_alpha="auto", target_modules="all-linear"))
    s = settings.fitted(Variant("", "loqt", {"r": 8}), TINY).fields["loqt_alpha"]
    assert all(layer.scaling["default"] == pytest.approx(s, abs=5e-4) for _, layer in loqt_layers(model))


def test_a_missing_package_is_told_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(methods.PACKAGES, "apollo", (lambda: False, "apollo-torch"))
    with pytest.raises(CompareError, match="pip install apollo-torch"):
        compare.main(["--results", str(tmp_path / "runs.jsonl"), "--text", str(tmp_path / "nowhere.csv")])
    assert not list(tmp_path.iterdir())
    compare.check_packages(["methods"], ["loqt", "galore"])
    compare.check_packages(["gaps"], None)


###############################
# What is kept
###############################


@pytest.mark.parametrize("damage", ["cut", "garbage", "no line break", "other json"])
def test_a_bad_line_is_named_and_nothing_dropped(tmp_path, damage):
    path = tmp_path / "runs.jsonl"
    for seed in range(3):
        results.append(path, made_up(tiny_spec(seed=seed)))
    lines = path.read_text().splitlines(keepends=True)
    bad = {"cut": 3, "garbage": 2, "no line break": 3, "other json": 1}[damage]
    lines[bad - 1] = {
        "cut": lines[2][:100],
        "garbage": "\0\0\0\n",
        "no line break": lines[2].rstrip("\n"),
        "other json": '{"spec": 1}\n',
    }[damage]
    path.write_text("".join(lines))
    with pytest.raises(CompareError) as error:
        compare.run_all([plan_of([LOQT])], path, Inline())
    assert f"{path}, line {bad}:" in str(error.value)
    assert path.read_text() == "".join(lines)
    # the repair that it names
    subprocess.run(str(error.value).rsplit("repeated: ", 1)[1], shell=True, check=True)
    assert len(results.read(path)) == 2


def test_a_full_disk_is_told():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    run = made_up(tiny_spec())
    with pytest.raises(CompareError, match="No space left") as error:
        results.append(Path("/dev/full"), run)
    # the result of minutes is not lost
    assert json.loads(str(error.value).splitlines()[-1]) == run
    with pytest.raises(CompareError, match="no file"):
        results.read(Path("/dev/full"))


def test_a_line_that_was_half_written_is_taken_back(tmp_path):
    path = tmp_path / "runs.jsonl"
    results.append(path, made_up(tiny_spec(seed=0)))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # room for 50 bytes of the line
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, hard))
        with pytest.raises(CompareError, match="cannot be written"):
            results.append(path, made_up(tiny_spec(seed=1)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    results.append(path, made_up(tiny_spec(seed=1)))
    assert len(results.read(path)) == 2


def test_a_result_that_cannot_be_written_ends_the_harness(tmp_path, monkeypatch):
    def full(path, run):
        raise CompareError("No space left on device")

    monkeypatch.setattr(compare.results, "append", full)
    workers = Inline()
    with pytest.raises(CompareError, match="No space left"):
        compare.run_all([plan_of([LOQT])], tmp_path / "runs.jsonl", workers)
    # the repetitions were not begun
    assert len(workers.specs) == 3


def test_a_run_that_diverges_is_recorded(tmp_path):
    # GaLore's decomposition of a gradient that is not finite raises an error
    decomposes = Variant("every step", "galore", {"update_proj_gap": 1})
    for variant, steps in ((BY_METHOD["full"], 6), (BY_METHOD["galore"], 6), (LOQT, 6), (decomposes, 60)):
        run = run_tiny(tiny_spec(variant, lr=1e30, steps=steps))
        assert run["diverged"] and run["loss"] is None and run["steps"] < steps
        results.append(tmp_path / "runs.jsonl", run)
    assert len(results.read(tmp_path / "runs.jsonl")) == 4
    assert run_tiny(tiny_spec(lr=1e-4))["loss"] is not None


def test_a_worker_that_dies_is_told_and_the_others_go_on(tmp_path, capsys):
    save_file({"training": tokens(40).int(), "validation": tokens(16).int()}, tmp_path / "blocks")
    workers = compare.Workers(1, tmp_path / "blocks", tmp_path)
    plan = plan_of([BY_METHOD["full"]], seeds=[0], rates=(0.001, 0.002), steps=2)
    first, second = plan.known({})

    def kill():
        while not workers.log(first).exists():
            time.sleep(0.05)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    assert compare.run_all([plan], tmp_path / "runs.jsonl", workers) == [first]
    assert results.read(tmp_path / "runs.jsonl").keys() == {key_of(second)}
    said = capsys.readouterr().err
    assert f"failed: {compare.name_of(first)}" in said and str(workers.log(first)) in said
    workers.close()


def test_from_the_command_line_to_tables_and_figures(tmp_path, monkeypatch, capsys):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"The film number {i * 7919 % 1013} was good and long.\n" for i in range(4000)))
    answers = []

    def workers(count, blocks, logs):
        def answer(spec):
            parts = load_file(blocks)
            answers.append(training.run(spec, parts["training"], parts["validation"]))
            return answers[-1]

        return Inline(answer)

    monkeypatch.setattr(compare, "Workers", workers)
    monkeypatch.setattr(compare.torch.cuda, "is_available", lambda: False)
    options = ["--size", "tiny", "--steps", "4", "--lrs", "0.01", "--seeds", "0", "1", "--methods", "full", "loqt"]
    options += ["--text", str(path), "--results", str(tmp_path / "out" / "runs.jsonl")]
    assert compare.main(options) == 0
    names = {file.name for file in (tmp_path / "out").iterdir()}
    stem = f"methods-{path.stem}-tiny-4"
    assert {f"{stem}.md", f"{stem}-loss.png", f"{stem}-memory.png"} <= names
    assert len(answers) == 4
    assert (tmp_path / "out" / f"{stem}.md").read_text() in capsys.readouterr().out
    shares = [run["ranks"]["change"] for run in answers if run["spec"]["method"] == "loqt"]
    mean, error = report.mean_and_error(shares)
    assert f"| LoQT | {mean:.3f} ± {error:.3f} |  |" in (tmp_path / "out" / f"{stem}.md").read_text()

    # from another text, other runs
    path.write_text(path.read_text().replace("film", "book"))
    assert compare.main(options) == 0
    assert len(answers) == 8
    assert compare.main([*options, "--report"]) == 0
    assert len(answers) == 8


def test_texts_are_told_apart_by_name(tmp_path):
    (tmp_path / "a book.txt").touch()
    labels = [text.label(*pair) for pair in ((None, None), (str(tmp_path / "a book.txt"), None), ("allenai/c4", "en"))]
    assert labels == ["", "a-book", "allenai-c4-en"]


def test_text_that_is_missing_or_short(tmp_path):
    with pytest.raises(CompareError, match="nowhere.csv"):
        text.documents(str(tmp_path / "nowhere.csv"), None, None)
    (tmp_path / "short.txt").write_text("a\n" * 100)
    with pytest.raises(CompareError, match="2,000 lines"):
        text.documents(str(tmp_path / "short.txt"), None, None)
    with pytest.raises(CompareError, match="validation blocks"):
        text.token_blocks((["some words"] * 30, ["few"]), 300, 16, tmp_path)


###############################
# What is trained
###############################


def test_all_methods_see_the_same_batches():
    spec, blocks = tiny_spec(seed=3), 7
    # 3 steps of 4 blocks are more than the 7 that there are
    order = training.batch_order(blocks, 12, seed=3)
    assert sorted(order[:7].tolist()) == list(range(7))
    expected = hashlib.sha256(tokens(blocks)[order].numpy().tobytes()).hexdigest()[:16]
    for variant in [*METHODS, Variant("halves", "loqt", micro_batches=2, projection_micro_batches=1)]:
        run = run_tiny(tiny_spec(variant, seed=3), blocks)
        assert run["batches"] == expected, variant.name
    other = run_tiny(tiny_spec(seed=4), blocks)
    assert other["batches"] != expected
    same = {**other, "spec": spec}
    with pytest.raises(CompareError, match="different batches"):
        report.check_batches([run, same])


@pytest.mark.parametrize("method", NAMES)
def test_every_method_trains_the_layers_and_all_else(method):
    torch.manual_seed(0)
    spec = tiny_spec(BY_METHOD[method])
    model = tiny_model()
    names = {name for name, _ in model.named_parameters()}
    targets = {f"{name}.weight" for name in methods.targeted_modules(model)}
    assert len(targets) == 7
    prepared = methods.prepare(spec, model)
    trained = {n.removeprefix("base_model.model.") for n, p in prepared.model.named_parameters() if p.requires_grad}
    assert names - targets <= trained
    own = trained - names
    if method in ("full", "galore", "apollo"):
        assert trained == names
    else:
        factors = 1 if method.startswith("loqt") else 2
        assert trained & targets == set() and len(own) == 7 * factors
    if "optim_target_modules" in prepared.arguments:
        arguments = training.training_arguments(spec, "unused", prepared.arguments)
        _, kwargs = training.Trainer.get_optimizer_cls_and_kwargs(arguments, prepared.model)
        projected = {id(p) for group in kwargs["params"] if "rank" in group for p in group["params"]}
        # the head is linear, too, and trains at full rank
        assert projected == {id(p) for n, p in prepared.model.named_parameters() if n in targets}


def test_p_is_taken_from_the_last_micro_batches():
    variant = Variant("last", "loqt-nq", {"r": 4}, micro_batches=2, projection_micro_batches=1)
    spec = tiny_spec(variant, steps=1)
    trained, _ = trained_model(spec)
    blocks = tokens(40)[training.batch_order(40, 4, seed=0)]
    energies = {}
    for part, batch in {"last": blocks[2:], "first": blocks[:2], "all": blocks}.items():
        model = tiny_model()
        model(input_ids=batch, labels=batch).loss.backward()
        layer = dict(loqt_layers(trained))["base_model.model.model.layers.0.self_attn.q_proj"]
        G = model.model.layers[0].self_attn.q_proj.weight.grad
        P = layer.loqt_P["default"]
        assert P.shape == (4, 32)
        best = torch.linalg.svdvals(G)[:4].square().sum()
        energies[part] = float((G @ P.T).square().sum() / best)
    assert energies["last"] == pytest.approx(1, abs=1e-4)
    assert energies["first"] < 0.99 and energies["all"] < 0.999


def lora_model():
    model = tiny_model()
    return methods.add_lora(model, {"r": 4, "lora_alpha": 8})


def test_relora_merges_without_changing_the_model_and_forgets_its_states():
    torch.manual_seed(0)
    model, batch = lora_model(), tokens(4)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    for _ in range(3):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = model(input_ids=batch).logits.detach()
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    factors = [factor["default"].weight for layer in layers for factor in (layer.lora_A, layer.lora_B)]
    old = [factor.detach().clone() for factor in factors]
    weights = [layer.get_base_layer().weight.detach().clone() for layer in layers]
    assert all(factor in optimizer.state for factor in factors)
    merge_and_restart(model, optimizer)
    torch.testing.assert_close(model(input_ids=batch).logits, before, rtol=1e-4, atol=1e-5)
    assert all(not layer.lora_B["default"].weight.any() for layer in layers)
    assert all(not torch.equal(factor, was) for factor, was in zip(factors, old, strict=True))
    changed = [not torch.equal(layer.get_base_layer().weight, w) for layer, w in zip(layers, weights, strict=True)]
    assert all(changed)
    held = {id(p) for p in optimizer.state}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in set(map(id, factors))]
    assert held == set(map(id, rest))


def test_relora_warms_up_again_after_each_restart():
    def schedule(make):
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        made, rates = make(optimizer), []
        for _ in range(40):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            made.step()
        return rates

    kind, options = "cosine_with_min_lr", {"min_lr_rate": 0.1}
    rates = schedule(lambda o: relora_schedule(o, kind, 4, 40, options, every=10, again=3))
    plain = schedule(lambda o: training_scheduler(o, kind, 4, 40, options))
    assert rates[:10] == plain[:10]
    for restart in (10, 20, 30):
        assert rates[restart] == 0
        assert 0 < rates[restart + 1] < rates[restart + 2] < rates[restart + 3]
        assert rates[restart + 3 : restart + 10] == plain[restart + 3 : restart + 10]
    # and the run uses it
    run = run_tiny(tiny_spec(BY_METHOD["relora"], steps=8))
    assert [update["step"] for update in run["updates"]] == [2, 4, 6]


def training_scheduler(optimizer, kind, warmup, steps, options):
    from transformers import get_scheduler

    return get_scheduler(kind, optimizer, warmup, steps, scheduler_specific_kwargs=options)


###############################
# What is counted and tabled
###############################


def test_bytes_are_those_of_a_hand_count():
    hidden, inner, vocabulary, r = 32, 48, TINY.vocabulary, TINY.rank
    rest = 2 * vocabulary * hidden + 3 * hidden
    shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    n = sum(a * b for a, b in shapes)
    small = sum(r * min(shape) for shape in shapes)
    large = sum(r * max(shape) for shape in shapes)
    # rotary frequencies, which transformers holds twice
    rotary = 2 * (hidden // TINY.heads // 2) * 4
    adam = 2 * 4

    counted = {method: run_tiny(tiny_spec(BY_METHOD[method], steps=2))["bytes"] for method in NAMES}
    full = counted["full"]
    assert full["weights"] == 4 * (rest + n) + rotary and full["gradients"] == 4 * (rest + n)
    # AdamW holds a step of 4 bytes for each of its 12 parameters
    assert full["optimizer"] == adam * (rest + n) + 4 * 12
    assert full["host"] == 0

    lora = counted["lora"]
    assert lora["weights"] == 4 * (rest + n + small + large) + rotary
    assert lora["gradients"] == 4 * (rest + small + large)
    assert lora["optimizer"] == adam * (rest + small + large) + 4 * (5 + 14)

    galore = counted["galore"]
    assert galore["weights"] == full["weights"] and galore["gradients"] == full["gradients"]
    # both moments of the projected gradients, and the projections
    assert galore["optimizer"] == adam * (rest + large) + 4 * small
    # and APOLLO a norm of 4 bytes for each of 7 layers
    assert counted["apollo"]["optimizer"] == galore["optimizer"] + 4 * 7

    for method in ("loqt", "loqt-nq"):
        loqt = counted[method]
        assert loqt["gradients"] == 4 * (rest + large)
        assert loqt["optimizer"] == adam * (rest + large) + 4 * (5 + 7)
        assert loqt["host"] == 4 * n
    # each layer also carries a seal and two counters
    seals = counted["loqt-nq"]["weights"] - (4 * (rest + n + small + large) + rotary)
    assert 0 < seals < 7 * 1024
    # in NF4 half a byte an element and 4 bytes for each block of 64, in place of 4 bytes an element
    blocks = sum(-(-a * b // 64) for a, b in shapes) + sum(-(-r * min(shape) // 64) for shape in shapes)
    saved = counted["loqt-nq"]["weights"] - counted["loqt"]["weights"]
    assert saved == 4 * (n + small) - (n + small) // 2 - 4 * blocks
    # the error of W, in NF4 too, lies where the base weights are
    kept = run_tiny(tiny_spec(with_feedback(BY_METHOD["loqt"]), steps=2))["bytes"]
    error = n // 2 + 4 * sum(-(-a * b // 64) for a, b in shapes)
    assert kept == {**counted["loqt"], "host": 4 * n + error}


def test_bytes_of_one_step_are_those_of_many():
    for variant in (
        LOQT,
        BY_METHOD["galore"],
        Variant("8", "loqt", {"r": 16}, optim="adamw_bnb_8bit", per_layer=True),
    ):
        spec = tiny_spec(variant, steps=4)
        assert training.measure_bytes(spec) == run_tiny(spec)["bytes"]


@pytest.mark.parametrize(
    "method, candidate", [("full", None), ("full", {"name": "rate_of_the_rest", "factor": 3.0}), ("loqt", None)]
)
def test_per_layer_updates_hold_one_gradient_and_train_the_same_without_clipping(method, candidate, monkeypatch):
    spec = tiny_spec(replace(BY_METHOD[method], candidate=candidate, per_layer=True), lr=0.01)
    model, freeing = trained_model(spec)
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    # with the ordinary optimizer in its place
    monkeypatch.setattr(training, "per_layer_optimizer", training.Trainer.get_optimizer_cls_and_kwargs)
    holding = run_tiny(spec)
    assert freeing["loss"] == holding["loss"]
    assert freeing["bytes"]["gradients"] == 4 * max(sizes) and holding["bytes"]["gradients"] == 4 * sum(sizes)
    del freeing["bytes"]["gradients"], holding["bytes"]["gradients"]
    assert freeing["bytes"] == holding["bytes"]
    assert run_tiny({name: value for name, value in spec.items() if name != "per_layer"})["loss"] != holding["loss"]


def test_a_base_is_trained_at_full_rank_on_text_in_another_order(monkeypatch):
    spec = tiny_spec(Variant("", "loqt-nq", base={"steps": 5, "lr": 0.01}))
    full, _ = trained_model(tiny_spec(BY_METHOD["full"], lr=0.01, steps=5))
    other = training.base_model(spec, tokens(40)).state_dict()
    monkeypatch.setattr(training, "BASE_ORDER", 0)
    same = training.base_model(spec, tokens(40)).state_dict()
    for name, weight in full.state_dict().items():
        assert torch.equal(same[name], weight) and not torch.equal(other[name], weight)
    # and it is what the run starts from
    without = {name: value for name, value in spec.items() if name != "base"}
    assert run_tiny(spec)["curve"] != run_tiny(without)["curve"]


def test_losses_around_a_switch_differ_by_what_it_loses(monkeypatch):
    gaps = {"update_interval": 2, "interval_schedule": "constant"}
    found = {}
    for method in ("loqt-nq", "loqt"):
        fields = {**gaps, "compensation_steps": 0, "loqt_alpha": 4.0}
        run = found[method] = run_tiny(tiny_spec(Variant("", method, fields), lr=0.05, steps=6))
        assert len(run["updates"]) == 3 and len({update["loss_before"] for update in run["updates"]}) == 3
    for update in found["loqt-nq"]["updates"]:
        assert update["loss_after"] == pytest.approx(update["loss_before"], abs=1e-5)
    assert all(abs(u["loss_after"] - u["loss_before"]) > 1e-4 for u in found["loqt"]["updates"])
    # to look at it changes nothing
    monkeypatch.setattr(training.SwitchLosses, "_loss", lambda losses, model: 0.0)
    assert run_tiny(found["loqt"]["spec"])["curve"] == found["loqt"]["curve"]


def test_tables_hold_mean_and_standard_error(tmp_path):
    path, plan = tmp_path / "runs.jsonl", plan_of([BY_METHOD["full"], LOQT], rates=(0.001, 0.002, 0.004))
    losses = {0: 1.5, 1: 1.25, 2: 1.875}

    def answer(spec):
        diverged = spec["method"] == "loqt" and spec["seed"] == 2
        return made_up(spec, losses[spec["seed"]] + abs(spec["lr"] - 0.002), diverged)

    compare.run_all([plan], path, Inline(answer))
    rows = {line.split(" | ")[0][2:]: line for line in report.table(plan, results.read(path)).splitlines()[5:9]}

    def slow(figures):
        mean = sum(figures) / len(figures)
        return mean, (sum((f - mean) ** 2 for f in figures) / (len(figures) - 1) / len(figures)) ** 0.5

    mean, error = slow(list(losses.values()))
    assert f"| 0.002 | {mean:.4f} ± {error:.4f} |" in rows["full-rank AdamW"]
    mean, error = slow([math.exp(loss) for loss in losses.values()])
    assert f"| {mean:.2f} ± {error:.2f} |" in rows["full-rank AdamW"]
    assert "| 1,000 | 200 | 30 | 1,230 | 4 |" in rows["full-rank AdamW"]
    mean, error = slow([losses[0], losses[1]])
    assert f"{mean:.4f} ± {error:.4f} (1 of 3 diverged)" in rows["LoQT"]
    # a best rate at the end of its grid is marked
    narrow = plan_of([LOQT], seeds=[0], rates=(0.002, 0.004))
    assert "| 0.002 † |" in report.table(narrow, results.read(path))


def test_differences_are_to_the_same_seed_rate_and_base_and_switches_before_and_after(tmp_path):
    path, base = tmp_path / "runs.jsonl", {"steps": 3, "lr": 0.1}
    fields = {"compensation_steps": 0}
    variants = [
        LOQT,
        Variant("K = 0", "loqt", fields),
        Variant("base", "loqt", base=base, search=True),
        Variant("base, K = 0", "loqt", fields, base=base, search=True),
    ]
    plan = plan_of(variants, rates=(0.002,), seeds=[0, 1])

    def answer(spec):
        added = (0.5 + spec["seed"]) * (spec["fields"]["compensation_steps"] == 0)
        return made_up(spec, 2.0 + spec["seed"] ** 2 - ("base" in spec) + added)

    compare.run_all([plan], path, Inline(answer))
    found = report.table(plan, results.read(path))
    # 0.5 and 1.5, and nothing against LoQT itself
    assert report.difference_rows(plan, results.read(path)) == [
        ("K = 0", "+1.0000 ± 0.5000"),
        ("base, K = 0", "+1.0000 ± 0.5000"),
    ]
    # of two seeds 1/8 and 2/8 at the first, 4/8 and 8/8 on average over the others
    assert found.count("| 0.18750 ± 0.06250 | 0.75000 ± 0.25000 |") == 4


def test_curves_are_means_over_the_seeds_at_the_steps_of_all():
    curves = [[[5, 4.0], [10, 3.0], [15, 2.0]], [[5, 3.0], [10, 2.0]], [[5, 5.0], [10, 4.0], [15, None]]]
    steps, means, errors = report.mean_curve([{"curve": curve} for curve in curves])
    assert (steps, means) == ([5, 10], [4.0, 3.0])
    # the standard deviation of three figures 1 apart is 1
    assert errors == pytest.approx([3**-0.5] * 2)


def test_figures_are_drawn_of_whatever_there_is(tmp_path):
    path, plan = tmp_path / "runs.jsonl", plan_of(METHODS)
    assert "has ended" in report.write_report(plan, {}, tmp_path)
    assert list(tmp_path.iterdir()) == []
    compare.run_all([plan], path, Inline(lambda spec: made_up(spec, diverged=spec["seed"] == 1)))
    report.write_report(plan, results.read(path), tmp_path)
    parts = ("loss", "memory", "updates")
    assert all((tmp_path / f"methods-tiny-10-{part}.png").stat().st_size > 1000 for part in parts)


def test_tokens_per_second_are_those_of_all_steps():
    history = [
        {"loss": 1.0, "step": 10, "loqt/tokens_per_second": 100.0},
        {"eval_loss": 1.0, "step": 10},
        {"loss": 1.0, "step": 15, "loqt/tokens_per_second": 50.0},
    ]
    # with 10 tokens a step: 1 second for 100 tokens, and 1 second for 50
    assert training.tokens_per_second(history, 10) == pytest.approx(150 / 2)
    assert training.tokens_per_second(history, 10, excluded=0.5) == pytest.approx(150 / 1.5)


def test_looking_at_switches_is_no_part_of_the_speed(monkeypatch):
    told = []

    def look(losses, model):
        losses.seconds += 100.0
        return 0.0

    monkeypatch.setattr(training.SwitchLosses, "_loss", look)
    monkeypatch.setattr(training, "tokens_per_second", lambda history, *others: told.append(others))
    run_tiny(tiny_spec(Variant("", "loqt", {"update_interval": 2, "interval_schedule": "constant"}), steps=8))
    # two looks at each of 4 updates
    assert told == [(TINY.batch * TINY.length, 800.0)]


###############################
# In which directions
###############################


@pytest.mark.parametrize("method", NAMES)
def test_effective_weights_are_those_that_the_model_computes_with(method):
    model, found = trained_model(tiny_spec(BY_METHOD[method], lr=0.01))
    names = methods.targeted_modules(tiny_model())
    weights = training.effective_weights(model, names)
    assert set(weights) == set(names)
    dense, others = tiny_model(), {n.removeprefix("base_model.model."): p for n, p in model.named_parameters()}
    for name, parameter in dense.named_parameters():
        layer = name.removesuffix(".weight")
        parameter.data.copy_(weights[layer] if layer in weights else others[name])
    batch = tokens(4)
    torch.testing.assert_close(dense(batch).logits, model(batch).logits, atol=1e-5, rtol=1e-4)
    start = training.effective_weights(tiny_model(), names)
    changes = [weights[name] - start[name] for name in weights]
    expected = sum(map(training.effective_rank, changes)) / len(changes)
    assert found["ranks"]["change"] == pytest.approx(expected, rel=1e-4)
    assert 0 < found["ranks"]["change"] < found["ranks"]["before"] < 1


def test_effective_rank_counts_equal_singular_values():
    basis = torch.linalg.qr(torch.randn(12, 8, generator=torch.Generator().manual_seed(0))).Q
    for count in (1, 5, 8):
        assert training.effective_rank(3 * basis[:, :count] @ basis[:8, :count].T) <= (count + 1e-3) / 8
        equal = torch.zeros(12, 8)
        equal[range(count), range(count)] = 7.0
        assert training.effective_rank(equal) == pytest.approx(count / 8)
    assert training.effective_rank(torch.zeros(3, 4)) == 0


@pytest.mark.parametrize("projection", ["svd", "random"])
def test_overlaps_are_those_of_the_subspaces_of_successive_updates(projection):
    projections = []

    class Watch(training.StopAtDivergence):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            layers = [layer for _, layer in loqt_layers(model)]
            if layers[0].num_updates("default") > len(projections):
                projections.append([layer.projection("default").double() for layer in layers])

    fields = {"projection": projection, "update_interval": 2, "interval_schedule": "constant"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "StopAtDivergence", Watch)
        found = run_tiny(tiny_spec(Variant("", "loqt", fields), steps=7))
    assert len(projections) == 4 and len(found["overlaps"]) == 3
    for old, new, overlap in zip(projections, projections[1:], found["overlaps"], strict=False):
        shares = []
        for P, Q in zip(old, new, strict=True):
            rows = [X if X.shape[0] == 8 else X.T for X in (P, Q)]
            bases = [torch.linalg.qr(X.T).Q for X in rows]
            shares.append(float((bases[0].T @ bases[1]).square().sum()) / 8)
        assert overlap == pytest.approx(sum(shares) / len(shares), rel=1e-3)
    assert not training.Directions(tiny_model(), []).overlaps
