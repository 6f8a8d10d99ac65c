import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager
from conditions import transformers_takes_this_peft
from transformers.integrations import peft as transformers_peft


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=2, help="how often the test of killed training kills")
    parser.addoption("--wide", action="store_true", help="also the tests with more processes than the others")


@pytest.fixture(autouse=True)
def skipped_where_transformers_wants_a_newer_peft(monkeypatch):
    monkeypatch.setattr(transformers_peft, "check_peft_version", transformers_takes_this_peft)


@pytest.fixture(autouse=True)
def without_bits_of_earlier_optimizers():
    # the Trainer tells bitsandbytes to keep the moments of embeddings in 32 bits, for the rest of the process and by `id`
    yield
    GlobalOptimManager.get_instance().initialize()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def wide(request):
    if not request.config.getoption("--wide"):
        pytest.skip("takes --wide")
