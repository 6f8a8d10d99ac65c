"""What only a CUDA device can show."""

import pytest
import torch
from common import loqt_config, single_linear, tiny_llama, token_batch, train_steps
from peft import get_peft_model

from loqt_peft.layers import gradient_offload
from loqt_peft.layers.find import loqt_layers
from loqt_peft.layers.gradient_offload import HostCopy


pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# cycles of a kernel that only waits, some tenths of a second
SLEEP = 500_000_000


def test_the_host_waits_for_a_copy_before_it_reads_it():
    tensor = torch.ones(1 << 20, device="cuda")
    memory = HostCopy(torch.zeros_like(tensor))
    memory.for_host()
    torch.cuda._sleep(SLEEP)
    late = HostCopy(tensor, memory)
    assert late.pinned_bytes
    assert late.for_host().min() == 1


def test_another_stream_waits_for_a_copy_before_it_reads_it():
    tensor = torch.ones(1 << 20, device="cuda")
    memory = HostCopy(torch.zeros_like(tensor))
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    late = HostCopy(tensor, memory)
    with torch.cuda.stream(torch.cuda.Stream()):
        back = late.for_device().to("cuda", non_blocking=True)
        assert back.min().item() == 1


def test_a_gradient_that_is_not_finite_is_noticed_before_it_arrives_on_the_host(monkeypatch):
    start_copy = gradient_offload._start_copy

    def late_copy(host, tensor, pinned):
        host.zero_()
        torch.cuda._sleep(SLEEP // 10)
        return start_copy(host, tensor, pinned)

    monkeypatch.setattr(gradient_offload, "_start_copy", late_copy)
    config = loqt_config(update_mode="whole", offload_gradients=True)
    model = get_peft_model(tiny_llama().cuda(), config).train()
    tokens = token_batch().cuda()
    model.begin_step(0)
    (model(input_ids=tokens, labels=tokens).loss * float("inf")).backward()
    with pytest.warns(UserWarning, match="14 of 14 LoQT layers is not finite"):
        assert model.end_step() is None


def test_writing_the_state_does_not_wait_for_the_device():
    _, layer = single_linear(torch.randn(64, 64))
    layer.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer._write_state("default", 3, True)
        packed = layer.weight_format("default").pack(torch.ones(64, 64, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert layer.loqt_state["default"].tolist() == [3, 1]
    assert layer.weight_format("default").unpack(packed).eq(1).all()


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_the_base_of_a_disabled_adapter_is_moved_as_it_is_stored(base_dtype):
    model = get_peft_model(tiny_llama().to("cuda", base_dtype), loqt_config(retain_base="cpu"))
    tokens = token_batch().cuda()
    with model.disable_adapter():
        before = model.eval()(input_ids=tokens).logits
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    model.begin_step(0)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    model.end_step(optimizer)
    assert all(layer.get_base_layer().weight.device.type == "cpu" for _, layer in loqt_layers(model))
    with model.disable_adapter():
        assert torch.equal(model.eval()(input_ids=tokens).logits, before)


def test_ddp_takes_a_model_with_an_offloaded_base(tmp_path):
    model = get_peft_model(tiny_llama(), loqt_config(retain_base="cpu"))
    train_steps(model, 1)
    model.cuda()
    assert all(layer.get_base_layer().weight.device.type == "cpu" for _, layer in loqt_layers(model))
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model, device_ids=[0])
        tokens = token_batch().cuda()
        parallel(input_ids=tokens, labels=tokens).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
