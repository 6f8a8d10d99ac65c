"""How findings become warnings and errors."""

import types
import warnings

import pytest

from loqt_peft.findings import Finding, report, report_once


WARNING = Finding("warning", "odd", "It is odd.", "Look at it.")
ERROR = Finding("error", "wrong", "It is wrong.", "Mend it.")


def test_warnings_are_said_beside_an_error():
    with (
        pytest.warns(UserWarning, match="It is odd. Look at it."),
        pytest.raises(ValueError, match="^It is wrong. Mend"),
    ):
        report([ERROR, WARNING])


def test_errors_are_raised_every_time_and_a_kind_of_warning_is_said_once():
    model = types.SimpleNamespace()
    with pytest.warns(UserWarning, match="It is odd"), pytest.raises(ValueError, match="It is wrong"):
        report_once(model, [WARNING, ERROR])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="It is wrong"):
            report_once(model, [WARNING, ERROR])
        report_once(model, [Finding("warning", "odd", "It is odd elsewhere.", "Look there.")])
    # another model has heard nothing
    with pytest.warns(UserWarning, match="It is odd"):
        report_once(types.SimpleNamespace(), [WARNING])
