"""What cannot be a LoQT layer: passed over by default, refused by name with the reason, before anything is changed."""

import ast
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from common import loqt_config, tiny_llama, token_batch, train_steps
from conditions import skip_where_transformers_cannot_make
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaForCausalLM

from loqt_peft.layers.find import loqt_layers
from loqt_peft.layers.read_linear import READ_OR_CALLED
from loqt_peft.layers.target_checks import READ_NOT_CALLED


def names_of(model):
    return {name for name, _ in loqt_layers(model)}


def two_updates(model, x):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(2):
        model.begin_step(step)
        model(x).square().sum().backward()
        optimizer.step()
        model.end_step(optimizer)
        optimizer.zero_grad()
    return model.eval()


def wrap(model, targets="all-linear", **kwargs):
    return get_peft_model(model, loqt_config(r=4, task_type=None, target_modules=targets, **kwargs))


def refused(model, targets, match, **kwargs):
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=match) as error:
        wrap(model, targets, **kwargs)
    assert {name: id(module) for name, module in model.named_modules()} == before
    return str(error.value)


###############################
# Weights that are read
###############################

# reads that do not happen: `query_states` is never given, and Bloom asks for `slow_but_exact`
NEVER = {("DisentangledSelfAttention", "in_proj"), ("BloomAttention", "dense"), ("BloomMLP", "dense_4h_to_h")}
# what transformers 5.13 and older read
OLD = {
    ("ConditionalDetrMHAttentionMap", "k_linear"),
    ("DeepseekOcr2TextMoe", "gate"),
    ("DeepseekV2Moe", "gate"),
    ("DetrMHAttentionMap", "k_linear"),
    ("VideoMAESelfAttention", "key"),
    ("VideoMAESelfAttention", "query"),
    ("VideoMAESelfAttention", "value"),
}
METADATA = {"dtype", "device", "shape", "SCB", "quant_state", "_is_hf_initialized"}
# most files have none, and parsing takes long
USE = re.compile(r"\w\.(?!\w*norm\w*\.)(\w+)\.weight\b(?!\.(?:dtype|device|shape))", re.IGNORECASE)


class Source:
    """A file of transformers' models, of which only the classes in question are parsed."""

    def __init__(self, path):
        self.classes = {}
        for text in re.split(r"^(?=[@a-zA-Z])", path.read_text(), flags=re.MULTILINE):
            if match := re.match(r"class (\w+)(?:\((.*)\))?:", text):
                self.classes[match[1]] = (text, re.findall(r"\w+", match[2] or ""))

    def linear_attributes(self, name):
        """Names of a class's linear layers."""
        text, bases = self.classes[name]
        attributes = set(re.findall(r"self\.(\w+) = .*(?:Linear|Conv1D\()", text))
        return attributes.union(*(self.linear_attributes(base) for base in bases if base in self.classes))

    def read_weights(self):
        """(class, child) of every linear layer whose `.weight` a method of that class, or one in this file, uses."""
        for name, (text, _) in self.classes.items():
            if any(".weight" in line and "init." not in line and USE.search(line) for line in text.splitlines()):
                for method in ast.parse(text).body[0].body:
                    if isinstance(method, ast.FunctionDef) and "init" not in method.name:
                        yield from self.reads_of(method, name)

    def reads_of(self, method, name):
        users = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
        for node, user in users.items():
            if not (isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)):
                continue
            layer = node.value
            if isinstance(user, ast.Attribute) and user.attr in METADATA or not isinstance(layer, ast.Attribute):
                continue
            if isinstance(user, ast.Call) and getattr(user.func, "id", "") in ("isinstance", "getattr", "hasattr"):
                continue
            if isinstance(layer.value, ast.Name) and layer.value.id == "self":
                owners = [name]
            else:
                end = ast.unparse(layer.value).rpartition(".")[2].replace("_", "")
                owners = [owner for owner in self.classes if owner.lower().endswith(end)]
            yield from ((owner, layer.attr) for owner in owners if layer.attr in self.linear_attributes(owner))


def test_the_table_of_weights_that_are_read_is_that_of_transformers():
    models = Path(transformers.__file__).parent / "models"
    found = {pair for path in models.glob("*/modeling_*.py") for pair in Source(path).read_weights()}
    tables = [*READ_NOT_CALLED.items(), *READ_OR_CALLED.items()]
    listed = [(owner, child) for owner, children in tables for child in children]
    assert len(listed) == len(set(listed))
    assert found - NEVER <= set(listed)
    # older and newer ones lack some of the models
    if Version("5.17") <= Version(transformers.__version__) < Version("5.24"):
        assert set(listed) - found == OLD


LANGUAGE_MODEL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "hybrid_layer_ids": [1, 3],
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "attention_head_dim": 32,
        "num_mem_blocks": 1,
        "chunk_size": 8,
    },
    # enough layers for weights to be rescaled in place
    "rwkv": {"attention_hidden_size": 32, "context_length": 64, "rescale_every": 1},
    "llama4_text": {"head_dim": 16, "intermediate_size_mlp": 48, "num_local_experts": 2},
    "phimoe": {"num_local_experts": 4},
    "falcon": {},
}
LEFT_OUT = {
    "mamba": {"dt_proj"},
    "mamba2": set(),
    "jamba": {"dt_proj"},
    # the second place of the shared block, where the first one is run
    "zamba2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "0", "1"},
    "rwkv": {"output", "value"},
    "llama4_text": {"router"},
    "phimoe": {"router"},
    "falcon": set(),
}


def language_model(model_type):
    skip_where_transformers_cannot_make(model_type)
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**LANGUAGE_MODEL, **MODELS[model_type]})
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("model_type", MODELS)
def test_layers_that_loqt_cannot_act_on_are_left_out_and_the_rest_is_exact(model_type):
    model = language_model(model_type)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    model = get_peft_model(model, loqt_config(r=4, target_modules="all-linear"))
    heads = {"lm_head", "head"}
    left = {name.rpartition(".")[2] for name in linear - names_of(model.base_model.model)} - heads
    assert left == LEFT_OUT[model_type]
    train_steps(model, 2)
    tokens = token_batch()
    with torch.no_grad():
        logits = model(tokens).logits
        merged = model.merge_and_unload()(tokens).logits
    assert torch.allclose(logits, merged, atol=1e-5)


@pytest.mark.parametrize(
    "model_type, target, other, match",
    [
        ("mamba", "dt_proj", "in_proj", "inside a MambaMixer, which reads or changes its weight by itself"),
        ("jamba", "dt_proj", "in_proj", "inside a JambaMambaMixer"),
        ("rwkv", "output", "key", "inside a RwkvSelfAttention"),
        ("llama4_text", "router", "k_proj", "is a Llama4Router, .* `forward` of its own"),
        ("phimoe", "router", "k_proj", "is a PhimoeTopKRouter"),
    ],
)
def test_layers_that_loqt_cannot_act_on_are_refused_by_name(model_type, target, other, match):
    model = language_model(model_type)
    message = refused(model, [other, target], match)
    assert message.endswith(f"exclude_modules=['{target}'].")
    # the advice helps
    model = wrap(model, [other, target], exclude_modules=[target])
    assert {name.rpartition(".")[2] for name in names_of(model.base_model.model)} == {other}


def test_shared_layers_are_refused_with_what_to_exclude():
    def block():
        shared = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "down_proj": nn.Linear(8, 8)})
        return nn.ModuleDict({"in_proj": nn.Linear(8, 8), "shared_transformer": shared})

    model, targets = nn.ModuleDict({"layers": nn.ModuleList([block(), block()])}), ["q_proj", "down_proj", "in_proj"]
    for name in ("q_proj", "down_proj"):
        first, second = (layer["shared_transformer"][name] for layer in model["layers"])
        second.weight = first.weight
    message = refused(model, targets, "the first one with 'layers.1.shared_transformer.q_proj'")
    advice = "(.*[.])?shared_transformer[.].*"
    assert message.endswith(f"exclude_modules='{advice}'.")
    model = wrap(model, targets, exclude_modules=advice)
    assert {name.rpartition(".")[2] for name in names_of(model.base_model.model)} == {"in_proj"}


def test_one_layer_in_two_places_is_shared():
    # only the first would be replaced
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(8, 8)), "b": nn.Sequential(nn.Linear(8, 8))})
    model["b"][0] = model["a"][0]
    refused(model, ["a.0"], "'a.0' shares its weight with 'b.0'")
    # a block that is used twice is not
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(8, 8))})
    model["b"] = model["a"]
    assert len(names_of(wrap(model, ["a.0"]))) == 1


class Reader(nn.Module):
    """A model that nobody has heard of."""

    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return nn.functional.linear(self.called(x.to(self.read.weight.dtype)), self.read.weight)


def test_reading_the_weight_is_an_error_in_the_first_forward_pass():
    x = torch.randn(4, 8)
    with pytest.raises(RuntimeError, match="leave the layer out of target_modules"):
        wrap(Reader())(x)
    # where it is the weight that the layer computes with it may be read
    model = wrap(Reader())
    with model.disable_adapter():
        model(x)
    model.merge_adapter()
    model(x)
    model = two_updates(wrap(Reader(), ["called"]), x)
    expected = model(x)
    assert torch.allclose(model.merge_and_unload()(x), expected, atol=1e-5)


def test_a_debugger_can_show_the_weight():
    layer = next(layer for _, layer in loqt_layers(wrap(Reader())))
    assert (
        repr(layer.weight) == f"UnreadableWeight(shape={tuple(layer.weight.shape)}, dtype=torch.float32, device=cpu)"
    )


@pytest.mark.parametrize("name", ["quantize_weight", "quantize_projection"])
def test_a_base_in_float64_cannot_be_quantized(name):
    dense = {"quantize_weight": None, "quantize_projection": None}
    with pytest.raises(ValueError, match=f"{name}='nf4' is not allowed on a base in torch.float64"):
        get_peft_model(tiny_llama().double(), loqt_config(**{**dense, name: "nf4"}))
    get_peft_model(tiny_llama().double(), loqt_config(**dense))


def test_torchs_shortcut_of_an_encoder_layer_gives_way():
    # in evaluation it reads the weights of linear1 and linear2
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = two_updates(wrap(encoder), torch.randn(2, 5, 16))
    assert names_of(model.base_model.model) == {"linear1", "linear2"}
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        evaluated, trained = model(x), model.train()(x)
    assert torch.allclose(evaluated, trained, atol=1e-6)


###############################
# Forward, parametrizations, hooks
###############################


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def patched():
    linear = nn.Linear(8, 8)
    linear.forward = lambda x: 3 * nn.Linear.forward(linear, x)
    return linear


UNFIT = {
    "subclass": (partial(Scaled, 8, 8), "is a Scaled, a subclass of a linear layer with a `forward` of its own"),
    "patched": (patched, "`forward` that was replaced on the instance"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(8, 8)), "weight that is computed"),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), "weight that is computed"),
    "old_spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), "weight that is computed"),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(8, 8), "weight", 3), "weight that is computed"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_linear_layers_of_their_own_kind_are_passed_over_or_refused(kind):
    build, match = UNFIT[kind]
    model = nn.Sequential(build(), nn.Linear(8, 8))
    refused(model, ["0", "1"], match)
    x = torch.randn(4, 8)
    own = model[0](x).detach()
    model = wrap(model)
    assert names_of(model.base_model.model) == {"1"}
    two_updates(model, x)
    # spectral norms go on with their power iteration
    if "spectral" not in kind:
        assert torch.equal(model.base_model.model[0](x), own)


def test_advice_spares_a_module_of_the_same_name():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "x": nn.ModuleDict({"a": Scaled(8, 8)})})
    assert refused(model, ["a"], "'x.a' is a Scaled").endswith("exclude_modules=['x.a'].")
    assert names_of(wrap(model, ["a"], exclude_modules=["x.a"])) == {"base_model.model.a"}


def test_layers_with_another_adapter_are_refused():
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"])).base_model.model
    refused(model, ["0"], "carries an adapter of another kind")


def test_hooks_are_called_as_before_the_first_update():
    torch.manual_seed(0)
    linear = nn.Linear(8, 8)
    calls = []
    handles = [
        linear.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        linear.register_forward_hook(lambda module, args, kwargs, output: 3 * output, with_kwargs=True),
        linear.register_full_backward_hook(lambda module, *gradients: calls.append("backward")),
    ]
    model = wrap(nn.Sequential(linear))
    x = torch.randn(4, 8)
    two_updates(model, x)
    layer = model.base_model.model[0]
    assert layer.num_updates("default") == 2 and calls == ["backward", "backward"]
    with torch.no_grad():
        hooked = model(x)
        assert torch.equal(hooked, 3 * layer.forward(2 * x))
        with model.disable_adapter():
            assert torch.equal(model(x), 3 * (nn.functional.linear(2 * x, linear.weight, linear.bias)))
    # dL/dW of what the layer itself computes
    model.train()
    model.begin_step(2)
    model(x).sum().backward()
    gradient = torch.full((4, 8), 3.0).T @ (2 * x)
    assert torch.allclose(layer.capture.stop()[0], gradient, rtol=1e-5)
    # after merging they are the dense layer's
    merged = model.eval().merge_and_unload()
    assert merged[0] is linear
    assert torch.allclose(merged(x), hooked, atol=1e-5)
    for handle in handles:
        handle.remove()
    assert torch.allclose(merged(x), merged[0].forward(x)) and not torch.allclose(merged(x), hooked)


def test_hooks_come_back_with_the_base_model():
    linear = nn.Linear(8, 8)
    linear.register_forward_hook(lambda module, args, output: 3 * output)
    x = torch.randn(4, 8)
    expected = linear(x)
    model = two_updates(wrap(nn.Sequential(linear)), x)
    assert not torch.allclose(model(x), expected)
    assert torch.equal(model.unload()(x), expected)


###############################
# Offloaded weights
###############################


def by_cpu(model, path):
    return cpu_offload(model, execution_device="cpu")


def by_disk(model, path):
    return disk_offload(model, str(path / "offload"), execution_device="cpu")


def by_device_map(model, path):
    model.save_pretrained(path / "base")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    return LlamaForCausalLM.from_pretrained(
        path / "base", device_map=device_map, offload_folder=str(path / "offload"), offload_buffers=True
    )


@pytest.mark.parametrize("offload", [by_cpu, by_disk, by_device_map])
def test_an_offloaded_base_is_refused(tmp_path, offload):
    adapter = get_peft_model(tiny_llama(), loqt_config())
    train_steps(adapter, 1)
    adapter.save_pretrained(tmp_path / "adapter")
    model = offload(tiny_llama(), tmp_path)
    message = refused(model, "all-linear", "is offloaded to the CPU or the disk")
    assert "self_attn.q_proj'" in message
    assert "device_map={'': 0}" in message
    with pytest.raises(ValueError, match="is offloaded to the CPU or the disk"):
        PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert not names_of(model)


def test_offloaded_full_rank_modules_are_refused():
    model = tiny_llama()
    cpu_offload(model.lm_head, execution_device="cpu")
    refused(model, "all-linear", "'lm_head' is offloaded", full_rank_modules="all")
    assert names_of(wrap(model).base_model.model)


def test_hooks_that_only_align_devices_are_none_of_our_concern():
    model = tiny_llama()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    model = get_peft_model(model, loqt_config())
    train_steps(model, 2)
    tokens = token_batch()
    with torch.no_grad():
        expected = model(tokens).logits
        assert torch.allclose(model.merge_and_unload()(tokens).logits, expected, atol=1e-5)


def test_a_module_is_not_offloaded_with_a_parameter_of_a_module_around_it():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(8, 8))})
    model["a"].register_parameter("scale", nn.Parameter(torch.ones(1)))
    add_hook_to_module(model["a"], AlignDevicesHook(execution_device="cpu", offload=True))
    assert names_of(wrap(model, ["a.0"])) == {"base_model.model.a.0"}


def test_everything_that_is_wrong_is_said_at_once():
    model = nn.ModuleDict({"a": Scaled(8, 8), "b": nn.Embedding(8, 8), "c": nn.Conv2d(8, 8, 1), "d": nn.Linear(8, 8)})
    message = refused(model, ["a", "b", "c", "d"], "Several things are wrong")
    for what in ("'a' is a Scaled", "'b' is a Embedding", "'c' is a Conv2d"):
        assert what in message
    assert "'d'" not in message


def test_a_model_without_values_is_no_offloaded_one():
    with torch.device("meta"):
        model = tiny_llama()
    assert len(names_of(get_peft_model(model, loqt_config()).base_model.model)) == 14
