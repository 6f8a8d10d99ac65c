"""A bar where people would wait, and none where they would not."""

import time

from loqt_peft import patience


def test_a_bar_comes_only_where_it_takes_long(capsys, monkeypatch):
    assert list(patience.patiently(range(3), "Packing")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(patience, "SECONDS", 0.2)
    for _ in patience.patiently(range(4), "Packing"):
        time.sleep(0.15)
    assert "Packing" in capsys.readouterr().err


def test_a_bar_from_the_beginning(capsys):
    assert list(patience.patiently(iter("ab"), "Converting", 2, at_once=True)) == ["a", "b"]
    assert "Converting: 100%" in capsys.readouterr().err
