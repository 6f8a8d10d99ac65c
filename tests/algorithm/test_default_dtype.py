"""What the package computes and saves does not depend on torch's default dtype and device nor on autocast."""

import contextlib
import itertools

import pytest
import torch
from common import loqt_config, tiny_llama, token_batch, train_steps
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from loqt_peft.algorithm import compensation, projection, quantization
from loqt_peft.choices import QUANT_TYPES
from loqt_peft.layers.find import loqt_layers


DTYPES = (torch.bfloat16, torch.float16, torch.float64)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture
def without_tables(monkeypatch):
    """As in a process that has quantized nothing yet; its tables are forgotten afterwards."""
    from bitsandbytes.backends import utils
    from bitsandbytes.backends.default import ops

    def forget():
        for name in ("_nf4_bins", "_make_portable_tables"):
            getattr(quantization, name).cache_clear()
        ops._get_4bit_quantize_bounds.cache_clear()

    monkeypatch.setattr(quantization, "_dynamic_maps", {})
    monkeypatch.setattr(utils, "_code_4bit_cache", {})
    forget()
    yield
    forget()


def operations():
    """The results of everything that makes tensors of its own, from the same inputs."""
    generator = torch.Generator().manual_seed(0)
    results = {}
    for shape, r in (((64, 48), 8), ((48, 64), 8), ((33, 22), 7)):
        W = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        for method in projection.OF_GRADIENT:
            results["project", shape, method] = projection.project(W, r, method)
        results["random", shape] = P = projection.random_projection(shape, r, 3)
        results["energy", shape] = projection.captured_energy(W, P)
        for quant_type, double_quant in itertools.product((*QUANT_TYPES, None), (False, True)):
            storage = quantization.storage_format(shape, quant_type, double_quant, torch.float32)
            packed = storage.pack(W)
            key = shape, quant_type, double_quant
            results["pack", key], results["unpack", key] = packed, storage.unpack(packed)
            results["empty", key] = storage.empty()
            new = compensation.compensate(W, P, storage, 0.5, 3)
            results |= {(name, key): value for name, value in new._asdict().items()}
    return results


def same(first, second):
    assert first.keys() == second.keys()
    return [
        name
        for name in first
        if first[name].dtype != second[name].dtype
        or not torch.equal(*(tensors[name].reshape(-1).view(torch.uint8) for tensors in (first, second)))
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operations_do_not_depend_on_the_default_dtype(without_tables, dtype):
    with default_dtype(dtype):
        first = operations()
    # with the tables that were made under the other dtype, too
    assert same(operations(), first) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tables_made_under_another_dtype_are_right(without_tables, dtype):
    expected = operations()
    for table in (quantization._nf4_bins, quantization._make_portable_tables):
        table.cache_clear()
    quantization._dynamic_maps.clear()
    with default_dtype(dtype):
        operations()
    assert same(operations(), expected) == []


def trained(tmp_path, dtype, **kwargs):
    """State and saved bytes of three updates under a default dtype; the model is the same one."""
    base = tiny_llama()
    with default_dtype(dtype):
        model = get_peft_model(base, loqt_config(**kwargs))
        updates = train_steps(model, 3)
        model.save_pretrained(tmp_path / str(dtype))
    saved = load_file(tmp_path / str(dtype) / "adapter_model.safetensors")
    live = {name: tensor.clone() for name, tensor in model.state_dict().items() if "loqt" in name}
    return model, {**live, **saved}, updates


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", [{}, {"projection": "random", "double_quant": True, "optimizer_state": "rotate"}])
def test_training_and_saved_bytes_do_not_depend_on_the_default_dtype(without_tables, tmp_path, dtype, settings):
    _, state, updates = trained(tmp_path, dtype, error_feedback=True, **settings)
    model, expected, expected_updates = trained(tmp_path, torch.float32, error_feedback=True, **settings)
    assert same(state, expected) == []
    for update, other in zip(updates, expected_updates, strict=True):
        assert {**update.metrics(), "loqt/seconds": 0} == {**other.metrics(), "loqt/seconds": 0}

    base = tiny_llama()
    with default_dtype(dtype):
        loaded = PeftModel.from_pretrained(base, tmp_path / str(dtype))
    assert torch.equal(loaded(token_batch()).logits, model.eval()(token_batch()).logits)


@pytest.mark.parametrize(
    "settings", [{}, {"projection": "random", "quantize_weight": "fp4", "quantize_projection": None}]
)
def test_updates_saving_and_loading_do_not_depend_on_the_default_device(without_tables, tmp_path, settings):
    def run(path, device):
        def elsewhere():
            # for the package's own part: not every model and optimizer can train that way
            return torch.device(device) if device else contextlib.nullcontext()

        base = tiny_llama()
        with elsewhere():
            model = get_peft_model(base, loqt_config(init_weights=False, error_feedback=True, **settings))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model.train()
        for step in range(2):
            with elsewhere():
                model.begin_step(step)
            tokens = token_batch(step)
            loss = model(input_ids=tokens, labels=tokens).loss
            with elsewhere():
                loss.backward()
                optimizer.step()
                assert model.end_step(optimizer).num_updates == step + 1
            optimizer.zero_grad()
        base = tiny_llama()
        with elsewhere():
            model.save_pretrained(path)
            loaded = PeftModel.from_pretrained(base, path)
        assert torch.equal(loaded.eval()(token_batch()).logits, model.eval()(token_batch()).logits)
        return load_file(path / "adapter_model.safetensors")

    torch.manual_seed(0)
    here = run(tmp_path / "here", None)
    torch.manual_seed(0)
    assert same(run(tmp_path / "meta", "meta"), here) == []


@pytest.mark.parametrize(
    "settings",
    [{}, {"projection": "random", "compensation_steps": 0}, {"optimizer_state": "rotate", "error_feedback": True}],
)
def test_updates_and_merges_do_not_depend_on_autocast(settings):
    def run(context):
        model = get_peft_model(tiny_llama(), loqt_config(**settings)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(2):
            model.begin_step(step, lambda step=step: step == 0)
            loss = model(input_ids=token_batch(step), labels=token_batch(step)).loss
            loss.backward()
            optimizer.step()
            with context():
                assert model.end_step(optimizer).num_updates == step + 1
            optimizer.zero_grad()
        # so that there is something to merge
        with torch.no_grad():
            for _, layer in loqt_layers(model):
                layer.loqt_B["default"].add_(0.1)
        tensors = {name: tensor for name, tensor in model.state_dict().items() if "loqt" in name}
        for moments in optimizer.state.values():
            tensors |= {("moment", len(tensors)): moments["exp_avg"]}
        with context():
            merged = model.merge_and_unload()
        return {**tensors, **merged.state_dict()}

    assert same(run(lambda: torch.autocast("cpu", torch.bfloat16)), run(contextlib.nullcontext)) == []
