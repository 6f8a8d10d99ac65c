"""The tasks of GLUE, the methods of the paper's table 2, and settings: the paper's (DeBERTaV3-base) or for small encoders."""

from dataclasses import dataclass

from loqt_peft.advice import CASES, PAPER_GLUE


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        name (`str`): Its name on the Hub.
        sentence_keys (`tuple[str, ...]`): The columns of text.
        labels (`tuple[str, ...]`): In the order of their numbers; empty for a regression.
        score (`str`): The metric that a table of results shows.
        validation_splits, test_splits (`tuple[str, ...]`): The first one is the main one.
    """

    name: str
    sentence_keys: tuple[str, ...]
    labels: tuple[str, ...]
    score: str
    validation_splits: tuple[str, ...] = ("validation",)
    test_splits: tuple[str, ...] = ("test",)

    @property
    def learning_rate(self) -> float:
        """The paper's, for LoQT."""
        return PAPER_GLUE[self.name][0]

    @property
    def num_train_epochs(self) -> int:
        """The paper's, for LoQT."""
        return PAPER_GLUE[self.name][1]

    @property
    def is_regression(self) -> bool:
        return not self.labels


METHODS = ("loqt", "loqt-nq", "lora", "loftq", "galore", "full")
PRESETS = ("paper", "small")
# found with MiniLM (22.7M parameters) on CoLA: README.md
SMALL = {
    "learning_rate": CASES["small_encoder"].learning_rate,
    "projection": CASES["small_encoder"].fields["projection"],
}

_ENTAILMENT = ("entailment", "not_entailment")

TASKS = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), "matthews_correlation"),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            "accuracy",
            ("validation_matched", "validation_mismatched"),
            ("test_matched", "test_mismatched"),
        ),
        Task("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "accuracy"),
        Task("qnli", ("question", "sentence"), _ENTAILMENT, "accuracy"),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), "accuracy"),
        Task("rte", ("sentence1", "sentence2"), _ENTAILMENT, "accuracy"),
        Task("sst2", ("sentence",), ("negative", "positive"), "accuracy"),
        Task("stsb", ("sentence1", "sentence2"), (), "pearson"),
    )
}


def preset(task_name: str | None, name: str = "paper") -> dict:
    """Arguments by one of `PRESETS`: what the task brings, if it is one of GLUE, and what small encoders need."""
    task = TASKS.get((task_name or "").lower().replace("-", ""))
    settings = {}
    if task is not None:
        settings = {
            "learning_rate": task.learning_rate,
            "num_train_epochs": task.num_train_epochs,
            "per_device_train_batch_size": 32,
            "per_device_eval_batch_size": 64,
        }
    return settings | (SMALL if name == "small" else {})
