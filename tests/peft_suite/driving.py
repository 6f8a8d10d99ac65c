"""What a training loop does for LoQT, done around PEFT's test bodies, which know nothing of update steps."""

import contextlib
import weakref

import torch
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.optim.optimizer import register_optimizer_step_post_hook

from loqt_peft import LoQTConfig


class Driver:
    """Calls `begin_step` before a training forward pass and `end_step` after the optimizer, as the callback does."""

    def __init__(self):
        self._steps = weakref.WeakKeyDictionary()
        self._begun = weakref.WeakSet()
        self._handle = None

    def __enter__(self):
        self._handle = register_optimizer_step_post_hook(self._after_optimizer_step)
        return self

    def __exit__(self, *_):
        self._handle.remove()

    def attach(self, model, step=0):
        self._steps[model] = step
        model.register_forward_pre_hook(self._before_forward)

    def _before_forward(self, model, _):
        if model.training and torch.is_grad_enabled() and model not in self._begun:
            model.begin_step(self._steps.setdefault(model, 0))
            self._begun.add(model)

    def _after_optimizer_step(self, optimizer, *_):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for model in list(self._begun):
            if any(id(p) in held for p in model.parameters()):
                model.end_step(optimizer)
                self._steps[model] += 1
                self._begun.discard(model)


def drift(model, steps=4):
    """Trains the active adapter of a PeftModel or LoQTModel for some steps, on gradients made layer by layer.

    Layer by layer, since not every model of PEFT's tests can run a forward pass. With an update every second step, this
    makes two switches, of which the second merges something, and leaves a B that has moved since.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    # An adapter may have layers in which the other one is not.
    layers = [layer for layer in layers if set(layer.active_adapters) & set(layer.loqt_B)]
    adapter_params = [p for n, p in model.named_parameters() if model.prefix in n and p.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    generator = torch.Generator().manual_seed(len(layers))
    # The bodies seed torch before they build a model and compare two models built so.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.train()
        # Steps of a fixed size: what matters is that B becomes large enough to be seen in the outputs, in any dtype.
        optimizer = torch.optim.SGD(adapter_params, lr=0.1, momentum=0.9)
        for step in range(steps):
            model.begin_step(step)
            for layer in layers:
                dtype = layer.get_base_layer().weight.dtype
                x = torch.randn(16, layer.in_features, generator=generator).to(dtype)
                target = torch.randn(16, layer.out_features, generator=generator)
                (layer(x).float() - target).square().mean().backward()
            for param in adapter_params:
                param.grad.sign_()
            optimizer.step()
            model.end_step(optimizer)
            optimizer.zero_grad(set_to_none=True)
    for module, mode in modes:
        module.training = mode
    return steps


def _drift_inactive(model, adapter_name):
    tuner = model.base_model
    active = tuner.active_adapters
    requires_grad = [(p, p.requires_grad) for p in model.parameters()]
    tuner.set_adapter([adapter_name])
    drift(tuner)
    tuner.set_adapter(active)
    for param, flag in requires_grad:
        param.requires_grad_(flag)


@contextlib.contextmanager
def driven(monkeypatch, modules, *, drifted):
    """Inside, models that PEFT's test modules make with LoQT are driven; and, if asked, drifted from the start."""
    with Driver() as driver:
        for module in modules:
            _wrap_get_peft_model(monkeypatch, module, driver, drifted)
            if drifted:
                _wrap_injection(monkeypatch, module)
        if drifted:
            _wrap_add_adapter(monkeypatch)
        yield


def _wrap_get_peft_model(monkeypatch, module, driver, drifted):
    original = module.get_peft_model

    def get_peft_model(model, peft_config, *args, **kwargs):
        peft_model = original(model, peft_config, *args, **kwargs)
        if isinstance(peft_config, LoQTConfig):
            driver.attach(peft_model, step=drift(peft_model) if drifted else 0)
        return peft_model

    monkeypatch.setattr(module, "get_peft_model", get_peft_model)


def _wrap_injection(monkeypatch, module):
    original = module.inject_adapter_in_model
    injected = []

    def inject_adapter_in_model(peft_config, model, adapter_name="default", low_cpu_mem_usage=False, state_dict=None):
        # The second injection of a test receives a saved state and has to be able to take it up from scratch.
        if not isinstance(peft_config, LoQTConfig) or low_cpu_mem_usage or injected:
            return original(peft_config, model, adapter_name, low_cpu_mem_usage, state_dict)
        injected.append(adapter_name)
        # Injection returns the plain model; the tuner is needed for the switches.
        tuner_cls = PEFT_TYPE_TO_TUNER_MAPPING[peft_config.peft_type]
        tuner = tuner_cls(model, peft_config, adapter_name=adapter_name, state_dict=state_dict)
        drift(tuner)
        return tuner.model

    monkeypatch.setattr(module, "inject_adapter_in_model", inject_adapter_in_model)


def _wrap_add_adapter(monkeypatch):
    add_adapter, load_adapter = PeftModel.add_adapter, PeftModel.load_adapter
    loading = []

    def adding(self, adapter_name, peft_config, *args, **kwargs):
        result = add_adapter(self, adapter_name, peft_config, *args, **kwargs)
        if isinstance(peft_config, LoQTConfig) and not loading:
            _drift_inactive(self, adapter_name)
        return result

    # Loading adds an adapter for the saved state to go into. That one has not switched before.
    def load(self, *args, **kwargs):
        loading.append(True)
        try:
            return load_adapter(self, *args, **kwargs)
        finally:
            loading.pop()

    monkeypatch.setattr(PeftModel, "add_adapter", adding)
    monkeypatch.setattr(PeftModel, "load_adapter", load)
