import pytest

from .adoption import PACKAGE


# Before the modules are imported, or failures in PEFT's bodies would say no more than AssertionError.
pytest.register_assert_rewrite(PACKAGE)
