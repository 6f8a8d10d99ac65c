"""The private parts of other packages that we lean on still are what they were."""

from datetime import timedelta

import bitsandbytes as bnb
import torch
import torch.distributed as dist
from common import tiny_llama
from peft import LoraConfig
from peft.utils import PeftType
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from loqt_peft import compat
from loqt_peft.layers.sharded import ShardableBuffers


def test_a_method_of_peft_can_be_looked_up_in_every_way():
    compat.add_peft_type("LOQT")
    assert PeftType("LOQT") is PeftType.LOQT is PeftType["LOQT"]
    assert list(PeftType).count(PeftType.LOQT) == 1


def test_all_linear_layers_are_those_of_the_model_but_its_head():
    model = tiny_llama(num_hidden_layers=1)
    config = compat.include_all_linear_layers(LoraConfig(target_modules="all-linear"), model)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {name for name in linear if any(name == t or name.endswith(f".{t}") for t in config.target_modules)}
    assert found == linear - {"lm_head"}


def test_buffers_by_adapter_are_saved():
    module = nn.Module()
    module.buffers_of = compat.BufferDict({}, persistent=True)
    module.buffers_of["default"] = torch.ones(2)
    assert list(module.state_dict()) == ["buffers_of.default"]


def test_the_object_that_is_calling_is_found():
    class Caller:
        def call(self, function):
            variable = "seen"  # noqa: F841
            return function()

    caller = Caller()
    ((found, method, variables),) = caller.call(lambda: list(compat.calling_objects(Caller)))
    assert found is caller and method == "call" and variables["variable"] == "seen"


def test_a_backward_pass_is_noticed():
    seen = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: seen.append(compat.is_in_backward()))
    seen.append(compat.is_in_backward())
    y.backward()
    assert seen == [False, True]


def test_all_hooks_change_places_and_their_handles_work():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    names = [
        name
        for name in vars(one)
        if name.endswith(("hooks", "hooks_with_kwargs", "hooks_always_called", "full_backward_hook"))
    ]
    about_passes = {name for name in names if "state_dict" not in name}
    assert about_passes == set(compat._HOOKS)
    calls = []
    handle = one.register_forward_hook(lambda *_: calls.append("forward"))
    compat.swap_hooks(one, other)
    one(torch.ones(2))
    assert calls == []
    other(torch.ones(2))
    assert calls == ["forward"]
    handle.remove()
    other(torch.ones(2))
    assert calls == ["forward"]


def test_fully_shard_takes_buffers_that_answer_for_parameters(tmp_path):
    buffers = ShardableBuffers({}, persistent=True)
    buffers["default"] = torch.arange(4, dtype=torch.uint8 if compat.SHARDS_INTEGERS else torch.float32)
    module = nn.Module()
    module.held, module.trained = buffers, nn.Parameter(torch.zeros(4))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(module)
        part = buffers["default"]
        assert isinstance(part, DTensor) and not part.requires_grad
        assert [name for name, _ in module.named_parameters()] == ["trained"] and "held.default" in module.state_dict()
        # a whole tensor goes into the part
        buffers["default"] = torch.zeros(4, dtype=part.dtype)
        assert buffers["default"] is part and not part.to_local().any()
    finally:
        dist.destroy_process_group()


def test_views_share_the_key_of_their_storage():
    for device in ("cpu", "meta"):
        tensor = torch.empty(4, device=device)
        assert compat.storage_key(tensor[1:]) == compat.storage_key(tensor)
        assert compat.storage_key(torch.empty(4, device=device)) != compat.storage_key(tensor)


def test_modules_in_float32_are_named():
    model = tiny_llama(num_hidden_layers=1)
    assert compat.kept_in_float32(model) == []
    model._keep_in_fp32_modules = {"norm"}
    assert compat.kept_in_float32(model) == ["norm"]


def test_four_bit_weights_are_packed_for_the_processor_and_back(monkeypatch):
    # its table of levels is made where the first weight lies, and here it would have no values
    monkeypatch.setattr(bnb.functional, "name2qmap", {})
    weight = bnb.nn.Params4bit(torch.empty(64, 64, device="meta"), requires_grad=False, quant_type="nf4")
    quantized = compat.quantize_now(weight, torch.device("meta"))
    assert quantized.dtype == torch.uint8 and quantized.quant_state.shape == torch.Size([64, 64])
    assert callable(bnb.functional._convert_weight_packed_for_cpu_inverse)


def test_a_group_tells_its_timeout(tmp_path):
    timeout = timedelta(seconds=77)
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1, timeout=timeout)
    try:
        assert compat.group_timeout(dist.group.WORLD, torch.device("cpu")) == timeout
    finally:
        dist.destroy_process_group()
