import pytest
from conditions import ARGUMENTS_ORDER_BATCHES, BATCHES_IN_ORDER

from benchmarks import common


@pytest.fixture(autouse=True)
def skipped_where_the_trainer_shuffles(monkeypatch):
    if not ARGUMENTS_ORDER_BATCHES:
        monkeypatch.setattr(common, "TrainingArguments", lambda **_: pytest.skip(BATCHES_IN_ORDER))
