import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=4, help="how often the test of killed training kills")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
