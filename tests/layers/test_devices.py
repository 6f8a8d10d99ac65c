"""What travels between devices, with `meta` in place of the device that computes."""

import pytest
import torch
from common import load_llama, loqt_config, tiny_llama, train_steps
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

from loqt_peft.algorithm.quantization import on_device, storage_format
from loqt_peft.layers import base_weight
from loqt_peft.layers.find import loqt_layers
from loqt_peft.training.figures import figures_of


class Transfers(TorchDispatchMode):
    """The tensors of the host that operations take, and those that they make there of others."""

    def __init__(self):
        super().__init__()
        self.moved, self.converted = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        output = func(*args, **(kwargs or {}))
        result = output if isinstance(output, torch.Tensor) else None
        if any(t.device.type == "cpu" for t in inputs) and result is not None:
            if result.device.type == "meta":
                self.moved += [t for t in inputs if t.device.type == "cpu"]
            # torch converts on the host what it moves from there
            if inputs[0].device.type == "cpu" and result.dtype != inputs[0].dtype:
                self.converted.append(result)
        return output

    @property
    def nbytes(self):
        return sum(t.nbytes for t in self.moved)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def offloaded_layers(base_dir, base):
    """Layers after an update, on `meta` but for their bfloat16 base weights."""
    model = get_peft_model(load_llama(base_dir, base, torch.bfloat16), loqt_config(retain_base="cpu"))
    train_steps(model, 1)
    layers = [layer for _, layer in loqt_layers(model)][:7]
    for layer in layers:
        layer._move_adapter_to_device_of_base_layer("default", torch.device("meta"))
        assert layer.base_is_offloaded
    return layers


# bytes of a weight as it is stored, for each of its elements: 4 bits and a float32 or uint8 absmax for 64 of them
@pytest.mark.parametrize("base, most", [("dense", 2), ("4bit", 0.5 + 4 / 64), ("4bit-double", 0.5 + 1 / 64)])
def test_an_offloaded_base_travels_as_it_is_stored(base_dir, base, most):
    for layer in offloaded_layers(base_dir, base):
        weight, x = (
            layer.get_base_layer().weight,
            torch.empty(2, 3, layer.in_features, dtype=torch.bfloat16, device="meta"),
        )
        # the levels of 4 bits, and of absmax with its own absmax and mean
        limit = most * layer.in_features * layer.out_features + (4 * (16 + 256 + 2 + 1) if base != "dense" else 0)
        with torch.no_grad(), Transfers() as forward:
            assert layer._base_forward(x).shape == (2, 3, layer.out_features)
        with torch.no_grad(), Transfers() as change:
            assert layer.base.value(layer.compute_device).dtype == torch.float32
        for transfers in (forward, change):
            assert transfers.nbytes <= limit and not transfers.converted
        # and it stays where it was
        assert layer.get_base_layer().weight is weight and weight.device.type == "cpu"
        state = getattr(weight, "quant_state", None)
        assert state is None or state.absmax.device.type == "cpu"
        assert base != "4bit-double" or state.state2.absmax.device.type == "cpu"


@pytest.mark.parametrize("base", ["dense", "4bit", "4bit-double", "Conv1D"])
def test_an_offloaded_base_computes_what_it_would_compute_on_the_device(base_dir, monkeypatch, base):
    if base == "Conv1D":
        config = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64, n_positions=32)
        model = get_peft_model(GPT2LMHeadModel(config), loqt_config())
    else:
        model = get_peft_model(load_llama(base_dir, base), loqt_config())
    layer = next(layer for _, layer in loqt_layers(model))
    x = torch.randn(2, 3, layer.in_features)
    expected, weight = layer._base_forward(x), layer.get_base_layer().weight
    # the other way round: the weight is on the host and comes to the device
    layer.get_base_layer().weight = on_device(weight, torch.device("meta"))
    monkeypatch.setattr(base_weight, "on_device", lambda *_: weight)
    assert torch.equal(layer._base_forward(x), expected)
    assert layer.get_base_layer().weight.device.type == "meta"


def test_writing_the_state_and_packing_copy_nothing_from_the_host():
    # a copy from the host's ordinary memory to a device is waited for
    layer = next(layer for _, layer in loqt_layers(get_peft_model(tiny_llama(), loqt_config())))
    layer._move_adapter_to_device_of_base_layer("default", torch.device("meta"))
    with torch.no_grad(), Transfers() as transfers:
        layer.updates._write("default", 3, True)
        assert not transfers.moved
        for quant_type, double_quant in (("nf4", False), ("fp4", False), ("nf4", True)):
            storage = storage_format((64, 48), quant_type, double_quant, torch.float32)
            # the second time, when the tables are there
            for _ in range(2):
                transfers.moved.clear()
                storage.unpack(storage.pack(torch.empty(64, 48, device="meta")))
            assert not transfers.moved


def test_the_state_of_an_update_is_written_element_by_element():
    layer = next(layer for _, layer in loqt_layers(get_peft_model(tiny_llama(), loqt_config())))
    layer.updates._write("default", 3, True)
    assert layer.loqt_state["default"].tolist() == [3, 1]
    assert layer.num_updates("default") == 3 and layer.update_pending("default")
    layer.loqt_state["default"].copy_(torch.tensor([5, 0]))
    assert layer.num_updates("default") == 5 and not layer.update_pending("default")


def test_a_state_that_takes_the_place_of_another_is_read():
    # as a loader that assigns does it
    layer = next(layer for _, layer in loqt_layers(get_peft_model(tiny_llama(), loqt_config())))
    for values in ([0, 0], [3, 1]):
        layer.loqt_state["default"] = torch.tensor(values)
        assert [layer.num_updates("default"), layer.update_pending("default")] == values


@pytest.mark.parametrize("quantize", ["nf4", None])
def test_later_switches_write_into_the_memory_that_is_there(quantize):
    model = get_peft_model(tiny_llama(), loqt_config(quantize_weight=quantize, quantize_projection=quantize))
    layers = [layer for _, layer in loqt_layers(model)]
    stored, values = [], []
    for step in range(3):
        train_steps(model, 1, start=step)
        buffers = [buffer["default"] for layer in layers for buffer in (layer.loqt_P, layer.loqt_weight)]
        stored.append([buffer.data_ptr() for buffer in buffers])
        values.append([buffer.clone() for buffer in buffers])
    assert stored[0] == stored[1] == stored[2]
    assert not any(map(torch.equal, values[1], values[2]))


def test_a_base_that_was_merged_goes_back_to_the_host_at_once(monkeypatch):
    model = get_peft_model(tiny_llama(), loqt_config(retain_base="cpu"))
    train_steps(model, 1)
    layer = next(layer for _, layer in loqt_layers(model))
    layer.merge()
    layer.loqt_weight["default"] = layer.loqt_weight["default"].to("meta")
    moved = []
    monkeypatch.setattr(layer.base, "move", moved.append)
    layer.unmerge()
    assert moved == [torch.device("cpu")]


class Took:
    """Stands in for a stretch of a device's time."""

    def __init__(self, seconds):
        self.seconds = lambda: seconds


def test_an_update_takes_as_long_as_its_slowest_device():
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    work = [(first, Took(1.0)), (second, Took(2.0)), (first, Took(1.5))]
    assert figures_of([[1.0] * 6], 1, True, work).seconds == 2.5
