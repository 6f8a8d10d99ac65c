"""torch.compile: one graph without breaks for ordinary steps, one more for update steps, and the same training."""

import pytest
import torch
from common import load_llama, loqt_config, tiny_llama, token_batch
from conditions import dynamo_inlines_hooks
from peft import get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend

from loqt_peft.layers.find import loqt_layers


pytestmark = dynamo_inlines_hooks


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(path)
    return path


def train(base_dir, base, backend=None, **kwargs):
    """The captured gradients and the number of updates of 9 steps, 3 of them updates, and the graphs after each step."""
    model = get_peft_model(load_llama(base_dir, base), loqt_config(update_interval=3, **kwargs))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    forward, counter = model, None
    if backend is not None:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        forward = torch.compile(model, backend=counter, fullgraph=True)
    gradients, graphs = [], []
    for step in range(9):
        model.begin_step(step, lambda: True)
        tokens = token_batch(step)
        forward(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        gradients += [
            layer.capture.gradient.clone() for _, layer in loqt_layers(model) if layer.capture.gradient is not None
        ]
        model.end_step(optimizer)
        optimizer.zero_grad()
        graphs.append(counter and counter.frame_count)
    assert all(layer.num_updates("default") == 3 for _, layer in loqt_layers(model))
    return gradients, graphs


def test_updates_with_random_directions_need_no_graph_of_their_own(base_dir):
    gradients, graphs = train(base_dir, "4bit", backend="aot_eager", projection="random")
    assert graphs == [1, 2, 2, 2, 2, 2, 2, 2, 2] and not gradients


@pytest.mark.parametrize("base, quantize", [("dense", None), ("4bit", "nf4")])
def test_compiled_training(base_dir, base, quantize):
    formats = {"quantize_weight": quantize, "quantize_projection": quantize, "error_feedback": quantize is not None}
    gradients, _ = train(base_dir, base, update_mode="whole", **formats)
    compiled_gradients, graphs = train(base_dir, base, backend="aot_eager", **formats)
    # step 0 runs on the base weights, 1 and 3 bring the two graphs of all further steps
    assert graphs == [1, 2, 2, 3, 3, 3, 3, 3, 3]
    assert len(gradients) == len(compiled_gradients) == 3 * 14
    # of the first update: further on a single code of NF4 may fall to the other side
    for expected, gradient in zip(gradients[:14], compiled_gradients[:14], strict=True):
        assert torch.linalg.norm(gradient - expected) <= 1e-5 * torch.linalg.norm(expected)
    for expected, gradient in zip(gradients[14:], compiled_gradients[14:], strict=True):
        assert torch.linalg.norm(gradient - expected) <= 0.05 * torch.linalg.norm(expected)
