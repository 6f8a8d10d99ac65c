"""README and site: their form, the tables and numbers that come from the code, one advice a case."""

import ast
import dataclasses
import json
import re
import sys

import pytest
from common import ROOT
from pages import PAGES, blocks, python_blocks

from loqt_peft import LoQTConfig, advice
from loqt_peft.cli.main import main as loqt
from loqt_peft.memory.options import MemoryOptions
from loqt_peft.memory.recommend import command, training_code


DOCS = ROOT / "docs"
# what was tried, as opposed to what is advised
LAB_NOTES = ("docs/lab-notes.md", "docs/comparison.md", "docs/gpu.md", "docs/versions.md")


@pytest.fixture(scope="module")
def site():
    sys.path[:0] = [str(DOCS), str(DOCS / "_ext")]
    import gpu_data
    import repository_links
    import tables

    yield {"gpu_data": gpu_data, "links": repository_links, "tables": tables}
    del sys.path[:2]


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


def test_every_page_is_in_the_index():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = {name for block in re.findall(r"```{toctree}\n(.*?)```", index, re.DOTALL) for name in block.split()}
    assert {path.stem for path in DOCS.glob("*.md")} - {"index"} <= listed


def test_tables_are_those_of_the_code(site):
    for page, (name, make) in site["tables"].TABLES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        assert f"<!-- {name} -->" in text
        assert site["tables"].with_table(text, name, make()) == text, "python docs/tables.py"


def test_links_out_of_the_pages(site):
    page = DOCS / "x.md"
    outward = site["links"].outward_links
    url = "https://github.com/loqt-peft/loqt_peft"
    assert (
        outward("[a](../examples/glue/README.md#minilm)", page)
        == f"[a]({url}/blob/main/examples/glue/README.md#minilm)"
    )
    assert outward("[a](../examples)", page) == f"[a]({url}/tree/main/examples)"
    assert outward("[a](memory.md#x) [b](#c) [d](https://e.f)", page) == "[a](memory.md#x) [b](#c) [d](https://e.f)"


###############################
# One advice a case
###############################


def pairs_in(code):
    """Scale and learning rate where a piece of code sets both; the defaults of `LoQTConfig` count."""
    rates = [float(rate) for rate in re.findall(r"learning_rate[ =\"':]+([\d.e-]+\d)", code)]
    scales = re.findall(r"loqt_alpha[ =\"':]+(auto|[\d.]+\d)", code)
    scales = [scale if scale == "auto" else float(scale) for scale in scales]
    # a scale that has a name of its own is not found
    if "LoQTConfig(" in code and "loqt_alpha" not in code:
        scales = [advice.DEFAULT_SCALE]
    return [(scale, rate) for scale in scales for rate in rates]


def documented():
    """Name and text of every piece of code that a user may copy."""
    for page in PAGES:
        if page not in LAB_NOTES:
            for number, code in enumerate([*python_blocks(page), *blocks(page, "bash")]):
                yield f"{page} {number}", code
    for path in sorted((ROOT / "examples").rglob("README.md")):
        for number, code in enumerate(re.findall(r"```\w+\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)):
            yield f"{path.relative_to(ROOT)} {number}", code
    for path in sorted((ROOT / "examples").glob("*.py")):
        yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "loqt_peft").rglob("*.py")):
        for number, code in enumerate(
            re.findall(r"```py(?:thon)?\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
        ):
            yield f"{path.relative_to(ROOT)} {number}", code
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        yield path.relative_to(ROOT).as_posix(), code


def test_scale_and_rate_are_a_pair_of_the_table():
    allowed = advice.allowed_pairs()
    found = {where: set(pairs_in(code)) - allowed for where, code in documented()}
    assert {where: pairs for where, pairs in found.items() if pairs} == {}
    assert sum(bool(pairs_in(code)) for _, code in documented()) > 8


def test_presets_and_help_texts_are_those_of_the_table():
    paper = {
        size: {name: getattr(LoQTConfig.paper(size), name) for name in recipe} for size, recipe in advice.PAPER.items()
    }
    assert paper == advice.PAPER
    help_text = {f.name: f.metadata.get("help", "") for f in dataclasses.fields(LoQTConfig)}["loqt_alpha"]
    rates = {float(rate) for rate in re.findall(r"0\.\d+", help_text)}
    assert rates == {advice.CASES["pretrain"].learning_rate, advice.CASES["continue"].learning_rate}
    assert f"learning rate {advice.CASES['paper'].learning_rate:g}" in LoQTConfig.paper.__doc__
    for case in advice.CASES.values():
        LoQTConfig(**case.fields)
        assert case.reason


def test_no_page_names_another_rate():
    rates = {case.learning_rate for case in advice.CASES.values()} | {rate for rate, _ in advice.PAPER_GLUE.values()}
    # of LoRA, full rank and GaLore, in what they are moved from, and of a plain model
    others = {1e-3, 2e-4, 3e-4, 1e-4, 5e-4}
    for page in ("README.md", "docs/start.md", "docs/settings.md", "docs/logs.md", "docs/troubleshooting.md"):
        text = PAGES[page].read_text(encoding="utf-8")
        named = re.findall(r"(?:learning[ _]rates?|rates?)(?: of|:| is|=| from)? ?`?(\d[\d.]*(?:e-\d+)?)\b", text)
        assert {float(rate.rstrip(".")) for rate in named} <= rates | others, page


###############################
# What fits my GPU
###############################

# of one model, in every method; the rank is a divisor of the hidden size
COMMON = {"sequence_length": 1024, "batch_size": 2, "gradient_accumulation_steps": 1, "optimizer": "adamw"}
SETTINGS = [
    {**COMMON, "method": method, "gradient_checkpointing": checkpointing, **more}
    for method, checkpointing, more in [
        ("loqt", False, {"rank": 2, "per_layer": False}),
        ("loqt", True, {"rank": 4, "optimizer": "adamw_8bit", "per_layer": False}),
        ("loqt", False, {"rank": 8, "optimizer": "adamw_8bit", "per_layer": True}),
        ("loqt", True, {"rank": 16, "per_layer": True}),
        ("loqt", False, {"rank": 4, "per_layer": False, "gradient_accumulation_steps": 4}),
        ("loqt", False, {"rank": 4, "per_layer": False, "sequence_length": 4096, "batch_size": 1}),
        ("qlora", False, {"rank": 16}),
        ("qlora", True, {"rank": 4, "optimizer": "adamw_8bit"}),
        ("galore", False, {"rank": 4, "optimizer": "adamw_8bit"}),
        ("galore", True, {"rank": 2}),
        ("full", False, {"per_layer": False}),
        ("full", True, {"optimizer": "adamw_8bit", "per_layer": True}),
    ]
]


def test_gpu_page_says_what_the_command_says(site, capsys, monkeypatch):
    gpu = site["gpu_data"]
    name = "LLaMA 130M (paper)"
    path, _ = gpu.MODELS[name]
    # a part of the axes, which the lookup goes by as well
    monkeypatch.setattr(gpu, "SEQUENCES", (1024, 4096))
    monkeypatch.setattr(gpu, "BATCHES", (1, 2))
    data = json.loads(json.dumps(gpu.build_data({name: gpu.MODELS[name]})))
    for setting in SETTINGS:
        options = dict(setting)
        if "rank" in options:
            options["rank"] = data["models"][name]["hidden"] // options["rank"]
        if options["method"] in ("loqt", "qlora"):
            options["double_quant"] = True
        line = command(str(path), MemoryOptions(**options))
        assert loqt([*line.split()[1:], "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        shown = gpu.lookup(data, name, setting)
        for phase, held in told["phases"].items():
            if phase in gpu.PHASES:
                assert shown[phase] == pytest.approx(sum(held.values()) / 1e9, abs=0.00501), (setting, phase)
        assert 0 <= shown["required"] - told["required_bytes"] / 1e9 < 0.01


def test_more_micro_batches_than_two_make_no_difference_on_the_device(site):
    gpu = site["gpu_data"]
    path, _ = gpu.MODELS["LLaMA 130M (paper)"]
    setting = {"method": "loqt", "rank": 64, "sequence_length": 256, "batch_size": 1}
    records = [gpu.record(path, {**setting, "gradient_accumulation_steps": n}) for n in (2, 4, 64)]
    assert records[0] == records[1] == records[2]


def test_models_and_methods_of_the_page(site):
    gpu = site["gpu_data"]
    assert set(gpu.METHODS) == {"loqt", "qlora", "galore", "full"}
    assert all(path.exists() for path, _ in gpu.MODELS.values())


###############################
# The recommendation
###############################


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "loqt-nq", "dtype": "float32"},
        {"rank": 16, "per_layer": True, "optimizer": "paged_adamw_8bit", "gradient_checkpointing": True},
        {"double_quant": True, "update_mode": "stagger", "error_feedback": True, "full_rank": False, "base": "dense"},
        {"offload_gradients": False, "projection": "random", "adapter_dtype": "float32", "batch_size": 4},
    ],
)
def test_a_recommended_command_gives_its_options_back(options, capsys):
    wanted = MemoryOptions(**options)
    line = command("examples/pretraining/configs/llama_60m.json", wanted, "24GiB")
    assert loqt([*line.split()[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["options"] == dataclasses.asdict(wanted)
    calls = {
        node.func.id: {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
        for node in ast.walk(ast.parse(training_code(wanted)))
        if isinstance(node, ast.Call) and node.func.id != "get_peft_model"
    }
    config = LoQTConfig(**calls["LoQTConfig"])
    assert config.r == wanted.rank and config.update_mode == wanted.update_mode
    assert (calls["LoQTConfig"]["loqt_alpha"], calls["TrainingArguments"]["learning_rate"]) in advice.allowed_pairs()


def test_plan_ends_with_a_recommendation_and_draws_it(tmp_path, capsys):
    picture = tmp_path / "plan.svg"
    model = "examples/pretraining/configs/llama_1b.json"
    assert loqt(["estimate", model, "--gpu", "8", "--plan", "--sequence-length", "256", "--plot", str(picture)]) == 0
    text = capsys.readouterr().out
    line = next(line.strip() for line in text.splitlines() if line.startswith("  loqt estimate"))
    assert text.index("Recommended") < text.index(line) < text.index("LoQTConfig(")
    assert loqt([*line.split()[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"] is True
    assert "<svg" in picture.read_text(encoding="utf-8")
