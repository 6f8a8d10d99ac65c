"""FSDP2 on CPUs with gloo: through the Trainer and accelerate, and through `fully_shard` in a loop of one's own."""

import pytest
import torch
from common import make_trainer, tiny_llama
from conditions import fsdp_reduces_unused_parameters, fsdp_shards_integers
from fsdp_worker import (
    DENSE,
    NF4,
    ONE_BLOCK,
    WIDTHS,
    each,
    killed,
    loop,
    make_model,
    own_loops,
    refusals,
    train,
    trainer_refusals,
    unused_module,
)
from peft import PeftModel
from processes import run
from safetensors.torch import load_file

from loqt_peft import get_last_checkpoint, prepare_model_for_fully_shard
from loqt_peft.saving.fsdp_checkpoint import unshard_checkpoint
from loqt_peft.training.sharding_checks import engine_findings


SHORT = {"max_steps": 9, "model": ONE_BLOCK}
SHARDED = {"state_dict_type": "SHARDED_STATE_DICT"}


def unlike(one, other):
    """Names of the tensors in which two states differ."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def farthest(one, other):
    """The largest difference of two runs' losses."""
    assert len(one["losses"]) == len(other["losses"]) > 0
    return max(abs(a - b) for a, b in zip(one["losses"], other["losses"], strict=True))


def assert_agreement(*ranks):
    """Processes hold the same bits after every update and at the end."""
    for run_of_first, *runs_of_others in zip(*ranks, strict=True):
        for other in runs_of_others:
            assert run_of_first["states"].keys() == other["states"].keys()
            assert not any(unlike(state, other["states"][step]) for step, state in run_of_first["states"].items())


def assert_as_one(tmp_path, world):
    configs = {"dense": DENSE, "nf4": NF4}
    ranks = run(world, each, [((f"{tmp_path}/{name}", config, {}), {}) for name, config in configs.items()])
    assert_agreement(*ranks)
    dense, nf4 = ranks[0]
    assert set(dense["states"]) == {"begin", 1, 8, 15, 22, "end"}
    assert farthest(dense, train(f"{tmp_path}/one", DENSE)) <= 1e-6
    # quantized from the start, as under FSDP2
    alone = train(f"{tmp_path}/alone", NF4, prepared=True)
    assert farthest({"losses": nf4["losses"][:7]}, {"losses": alone["losses"][:7]}) <= 1e-4
    # another rounding of a sum turns some of the codes
    assert farthest(nf4, alone) <= 5e-3


@fsdp_shards_integers
def test_two_processes_train_as_one(tmp_path):
    assert_as_one(tmp_path, 2)


@fsdp_shards_integers
def test_three_processes_train_as_one(tmp_path, wide):
    assert_as_one(tmp_path, 3)


def test_replicas_of_shards_train_as_one(tmp_path, wide):
    ranks = run(4, each, [((f"{tmp_path}/hsdp", DENSE, {}), {"hsdp": (2, 2)})])
    assert_agreement(*ranks)
    assert farthest(ranks[0][0], train(f"{tmp_path}/one", DENSE)) <= 1e-6


@fsdp_shards_integers
def test_what_changes_no_number_and_what_changes_little(tmp_path):
    everything = {**NF4, "full_rank_modules": "all", "optimizer_state": "rotate"}
    calls = {
        "plain": ((everything, {}), {}),
        "checkpointing of fsdp": ((everything, {"activation_checkpointing": True}), {}),
        "checkpointing of transformers": ((everything, {}), {"gradient_checkpointing": True}),
        "offload": ((everything, {"cpu_offload": True}), {}),
        "accumulation": ((everything, {}), {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}),
        "fused": ((everything, {}), {"optim": "adamw_torch_fused"}),
        "rotated": (({**DENSE, "optimizer_state": "rotate"}, {}), {}),
        "reset": (({**everything, "optimizer_state": "reset"}, {}), {}),
        "bf16": ((everything, {}), {"bf16": True}),
    }
    ranks = run(2, each, [((f"{tmp_path}/{n}", *args), {**SHORT, **kwargs}) for n, (args, kwargs) in calls.items()])
    assert_agreement(*ranks)
    runs = dict(zip(calls, ranks[0], strict=True))
    for name in ("checkpointing of fsdp", "checkpointing of transformers", "offload"):
        assert not unlike(runs[name]["states"]["end"], runs["plain"]["states"]["end"]), name
    for name in ("accumulation", "fused"):
        assert farthest(runs[name], runs["plain"]) <= 1e-3, name
    moments = {name: value for name, value in runs["reset"]["states"][8].items() if name.endswith("exp_avg")}
    assert not any("loqt_B" in name for name in moments) and moments
    alone = train(f"{tmp_path}/one", {**DENSE, "optimizer_state": "rotate"}, **SHORT)
    moments = {name: value for name, value in alone["states"][8].items() if name.endswith("loqt_B.default.exp_avg")}
    assert len(moments) == 7
    for name, value in moments.items():
        torch.testing.assert_close(runs["rotated"]["states"][8][name], value, rtol=1e-3, atol=1e-6)
    assert farthest(runs["bf16"], runs["plain"]) <= 0.05


@fsdp_shards_integers
def test_moments_in_8_bits(tmp_path):
    # torchao quantizes parts of 4096 elements and more
    model = {"hidden_size": 128, "intermediate_size": 128, **ONE_BLOCK}
    config = {**NF4, "r": 64, "update_interval": 4, "optimizer_state": "rotate"}
    arguments = {**SHORT, "model": model, "learning_rate": 1e-3}
    in_8_bits = {**arguments, "optim": "adamw_torch_8bit"}
    whole, parts = f"{tmp_path}/whole", f"{tmp_path}/parts"
    calls = [
        ((whole, config, {}), arguments),
        ((parts, config, SHARDED), {**in_8_bits, "save_strategy": "steps", "save_steps": 5}),
        ((f"{tmp_path}/resumed", config, SHARDED, f"{parts}/checkpoint-5"), in_8_bits),
    ]
    ranks = run(2, each, calls)
    assert_agreement(*ranks)
    exact, quantized, resumed = ranks[0]
    assert 0 < farthest(exact, quantized) <= 1e-3
    assert not unlike(quantized["states"]["end"], resumed["states"]["end"])


@fsdp_shards_integers
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_resume(tmp_path, kind):
    """Before, on and after an update; on as many processes, and on others."""
    config = {**NF4, "full_rank_modules": "all", "optimizer_state": "rotate"}
    # whose wrappers are in the names of modules
    fsdp = {"state_dict_type": kind, "activation_checkpointing": True}
    through = f"{tmp_path}/through"
    saving = {"model": ONE_BLOCK, "max_steps": 10, "save_strategy": "steps", "save_steps": 1}

    def again(step, **kwargs):
        arguments = f"{tmp_path}/{step}", config, fsdp, f"{through}/checkpoint-{step}"
        return arguments, {**saving, "save_strategy": "no", **kwargs}

    ranks = run(2, each, [((through, config, fsdp), saving)])
    assert get_last_checkpoint(through) == f"{through}/checkpoint-10"
    resumed = run(2, each, [again(step) for step in (7, 8, 9)])
    for step, result in zip((7, 8, 9), resumed[0], strict=True):
        assert result["losses"] == ranks[0][0]["losses"][step:]
        assert not unlike(result["states"]["end"], ranks[0][0]["states"]["end"])
    # step 8 ends with an update
    for world in (1, 3):
        for rank in run(world, each, [again(8, max_steps=9)]):
            assert not unlike(rank[0]["states"]["begin"], ranks[0][0]["states"][8])
    if kind == "FULL_STATE_DICT":
        alone = unshard_checkpoint(f"{through}/checkpoint-8", f"{tmp_path}/alone/checkpoint-8")
        result = train(f"{tmp_path}/alone", config, resume=alone, **{**saving, "save_strategy": "no"})
        assert not unlike(result["states"]["begin"], ranks[0][0]["states"][8])
        assert farthest(result, {"losses": ranks[0][0]["losses"][8:]}) <= 1e-5
    # and the adapter is as everywhere else
    saved = load_file(f"{through}/final/adapter_model.safetensors")
    model = PeftModel.from_pretrained(tiny_llama(**WIDTHS, **ONE_BLOCK), f"{through}/final", is_trainable=True)
    assert model.peft_config["default"].num_updates == 2
    state = {name.replace(".default", ""): tensor for name, tensor in model.state_dict().items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items() if "loqt_seal" not in name)
    end = {name.replace(".default", ""): tensor for name, tensor in ranks[0][0]["states"]["end"].items()}
    assert all(torch.equal(saved[name], end[name]) for name in saved if name in end)
    assert sum(name in end for name in saved) == len([name for name in saved if "loqt_seal" not in name])


@fsdp_shards_integers
def test_plain_fully_shard():
    ranks = run(2, own_loops)
    plain, offloaded, poisoned = ranks[0]
    for first, second in zip(*ranks, strict=True):
        assert not any(unlike(one, other) for one, other in zip(first["states"], second["states"], strict=True))
    halves = [sum(losses) / 2 for losses in zip(*(rank[0]["losses"] for rank in ranks), strict=True)]
    alone = loop(make_model(DENSE, **ONE_BLOCK), 9)
    assert farthest({"losses": halves}, alone) <= 1e-6
    assert plain["updates"] == alone["updates"] == [step in (0, 7) for step in range(9)]
    assert not unlike(plain["states"][-1], offloaded["states"][-1])
    # one process had no finite gradient: both wait for the next step
    assert [rank[2]["updates"] for rank in ranks] == [[step in (0, 8) for step in range(9)]] * 2


@fsdp_reduces_unused_parameters
def test_a_module_that_did_not_run_on_one_process():
    first, second = run(2, unused_module)
    assert first["updates"] == second["updates"] == [True, False]
    assert not any(unlike(one, other) for one, other in zip(first["states"], second["states"], strict=True))


@fsdp_shards_integers
def test_a_process_that_ends_within_an_update():
    told, _ = run(2, killed, dying=[1], timeout=60)
    assert "Error" in told


@fsdp_shards_integers
def test_refusals_of_a_loop_of_ones_own():
    for told in run(2, refusals):
        assert "differ between the processes" in told["unlike"] and "loqt_B" in told["unlike"]
        assert "prepare_model_for_fully_shard" in told["unprepared"]
        assert "error_feedback" in told["feedback"]
        assert all("in one process" in message for message in told["actions"]), told["actions"]


@fsdp_shards_integers
def test_one_process_prepares_as_well():
    model = prepare_model_for_fully_shard(make_model({"retain_base": "drop"}))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    base = tiny_llama(**WIDTHS).model.layers[0].self_attn.q_proj.weight
    assert torch.equal(layer.base.value(torch.device("cpu")), base)
    # the first switch compensates against the exact weight
    assert not torch.equal(layer.weight_format("default").unpack(layer.loqt_weight["default"]), base)
    loop(model, 1)
    with pytest.raises(ValueError, match="retain_base='drop'"):
        layer.base.value(torch.device("cpu"))


@fsdp_shards_integers
def test_refusals_of_the_trainer(tmp_path):
    expected = {
        "fsdp1": "fsdp_version: 2",
        "cpu_ram_efficient_loading": "Set it to false",
        "bitsandbytes": "adamw_torch_8bit",
        "torchao, whole": "SHARDED_STATE_DICT",
        "dtypes": "bf16=True",
    }
    for told in run(2, trainer_refusals, str(tmp_path)):
        (inactive,) = told.pop("not active")
        assert "FSDP was asked for, and is not active" in inactive and "MULTI_CPU" in inactive
        assert told.keys() == expected.keys()
        for name, (error, untouched) in told.items():
            assert expected[name] in error and untouched, name


@pytest.mark.parametrize("kind", ["tensor", "context"])
def test_parallelism_within_a_layer_is_refused(kind):
    parallelism = pytest.importorskip("accelerate.parallelism_config")
    model = make_model()
    args = make_trainer(model, "unused").args
    args.parallelism_config = parallelism.ParallelismConfig(**{"tp_size" if kind == "tensor" else "cp_size": 2})
    assert [finding.code for finding in engine_findings(model, args)] == [f"{kind}_parallel"]
