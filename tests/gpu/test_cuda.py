"""What only a CUDA device can show. With `LOQT_TEST_DEVICE=cpu` it runs on the CPU and shows that it runs."""

from contextlib import contextmanager

import pytest
import torch
from common import loqt_config, single_linear, tiny_llama, token_batch, train_steps
from gpu_device import DEVICE, another_stream, needs_device, on_cuda, sleep, synchronize
from peft import get_peft_model

from loqt_peft.layers import gradient_offload
from loqt_peft.layers.find import loqt_layers
from loqt_peft.layers.gradient_offload import HostCopy


pytestmark = needs_device


@contextmanager
def no_waiting():
    """Whatever makes the host wait for the device is an error."""
    if on_cuda:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if on_cuda:
            torch.cuda.set_sync_debug_mode("default")


def test_the_host_waits_for_a_copy_before_it_reads_it():
    tensor = torch.ones(1 << 20, device=DEVICE)
    memory = HostCopy(torch.zeros_like(tensor))
    memory.for_host()
    sleep()
    late = HostCopy(tensor, memory)
    assert bool(late.pinned_bytes) == on_cuda
    assert late.for_host().min() == 1


def test_another_stream_waits_for_a_copy_before_it_reads_it():
    tensor = torch.ones(1 << 20, device=DEVICE)
    memory = HostCopy(torch.zeros_like(tensor))
    synchronize()
    sleep()
    late = HostCopy(tensor, memory)
    with another_stream():
        back = late.for_device().to(DEVICE, non_blocking=True)
        assert back.min().item() == 1


def test_a_gradient_that_is_not_finite_is_noticed_before_it_arrives_on_the_host(monkeypatch):
    start_copy = gradient_offload._start_copy

    def late_copy(host, tensor, pinned):
        host.zero_()
        sleep(5 * 10**7)
        return start_copy(host, tensor, pinned)

    monkeypatch.setattr(gradient_offload, "_start_copy", late_copy)
    config = loqt_config(update_mode="whole", offload_gradients=True)
    model = get_peft_model(tiny_llama().to(DEVICE), config).train()
    tokens = token_batch().to(DEVICE)
    model.begin_step(0)
    (model(input_ids=tokens, labels=tokens).loss * float("inf")).backward()
    with pytest.warns(UserWarning, match="14 of 14 LoQT layers is not finite"):
        assert model.end_step() is None


def test_writing_the_state_does_not_wait_for_the_device():
    _, layer = single_linear(torch.randn(64, 64))
    layer.to(DEVICE)
    weight = torch.ones(64, 64, device=DEVICE)
    # the first time tables are made
    layer.weight_format("default").pack(weight)
    with no_waiting():
        layer.updates._write("default", 3, True)
        packed = layer.weight_format("default").pack(weight)
    assert layer.loqt_state["default"].tolist() == [3, 1]
    assert layer.weight_format("default").unpack(packed).eq(1).all()


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_the_base_of_a_disabled_adapter_is_moved_as_it_is_stored(base_dtype):
    model = get_peft_model(tiny_llama().to(DEVICE, base_dtype), loqt_config(retain_base="cpu"))
    tokens = token_batch().to(DEVICE)
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
    model.to(DEVICE)
    assert all(layer.get_base_layer().weight.device.type == "cpu" for _, layer in loqt_layers(model))
    backend, device_ids = ("nccl", [0]) if on_cuda else ("gloo", None)
    torch.distributed.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model, device_ids=device_ids)
        tokens = token_batch().to(DEVICE)
        parallel(input_ids=tokens, labels=tokens).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
