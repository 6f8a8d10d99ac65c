"""benchmarks.compare: the command line and its text."""

import pytest
from compare_runs import Inline, made_up
from safetensors.torch import load_file

from benchmarks.compare import __main__ as command
from benchmarks.compare import methods, tables, text, training
from benchmarks.compare.errors import CompareError


def test_a_missing_package_is_told_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(methods.PACKAGES, "apollo", (lambda: False, "apollo-torch"))
    with pytest.raises(CompareError, match="pip install apollo-torch"):
        command.main(["--results", str(tmp_path / "runs.jsonl"), "--text", str(tmp_path / "nowhere.csv")])
    assert not list(tmp_path.iterdir())
    command.check_packages(["methods"], ["loqt", "galore"])
    command.check_packages(["gaps"], None)


def test_from_the_command_line_to_tables_and_figures(tmp_path, monkeypatch, capsys):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"The film number {i * 7919 % 1013} was good and long.\n" for i in range(4000)))
    answers = []

    def workers(count, blocks, logs):
        def answer(spec):
            parts = load_file(blocks)
            run = training.run(spec, parts["training"], parts["validation"]) if len(answers) < 4 else made_up(spec)
            answers.append(run)
            return run

        return Inline(answer)

    monkeypatch.setattr(command, "Workers", workers)
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    options = ["--size", "tiny", "--steps", "4", "--lrs", "0.01", "--seeds", "0", "1", "--methods", "full", "loqt"]
    options += ["--text", str(path), "--results", str(tmp_path / "out" / "runs.jsonl")]
    assert command.main(options) == 0
    names = {file.name for file in (tmp_path / "out").iterdir()}
    stem = f"methods-{path.stem}-tiny-4"
    assert {f"{stem}.md", f"{stem}-loss.png", f"{stem}-memory.png"} <= names
    assert len(answers) == 4
    assert (tmp_path / "out" / f"{stem}.md").read_text() in capsys.readouterr().out
    shares = [run["ranks"]["change"] for run in answers if run["spec"]["method"] == "loqt"]
    mean, error = tables.mean_and_error(shares)
    assert f"| LoQT | {mean:.3f} ± {error:.3f} |  |" in (tmp_path / "out" / f"{stem}.md").read_text()

    # from another text, other runs
    path.write_text(path.read_text().replace("film", "book"))
    assert command.main(options) == 0
    assert len(answers) == 8
    assert command.main([*options, "--report"]) == 0
    assert len(answers) == 8


def test_texts_are_told_apart_by_name(tmp_path):
    (tmp_path / "a book.txt").touch()
    labels = [text.label(*pair) for pair in ((None, None), (str(tmp_path / "a book.txt"), None), ("allenai/c4", "en"))]
    assert labels == ["", "a-book", "allenai-c4-en"]


def test_text_that_is_missing_or_short(tmp_path):
    with pytest.raises(CompareError, match="nowhere.csv"):
        text.documents(str(tmp_path / "nowhere.csv"), None, None)
    (tmp_path / "short.txt").write_text("a\n" * 100)
    with pytest.raises(CompareError, match="2,000 lines"):
        text.documents(str(tmp_path / "short.txt"), None, None)
    with pytest.raises(CompareError, match="validation blocks"):
        text.token_blocks((["some words"] * 30, ["few"]), 300, 16, tmp_path)
