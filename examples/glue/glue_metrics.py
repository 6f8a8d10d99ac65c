"""GLUE's metrics: those of `evaluate`, or the same numbers by scikit-learn and scipy where the Hub cannot be reached."""

import logging
from collections.abc import Callable

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


logger = logging.getLogger(__name__)

Metric = Callable[[np.ndarray, np.ndarray], dict[str, float]]


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"accuracy": float(accuracy_score(labels, predicted))}


def accuracy_and_f1(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {**accuracy(predicted, labels), "f1": float(f1_score(labels, predicted))}


def matthews_correlation(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"matthews_correlation": float(matthews_corrcoef(labels, predicted))}


def pearson_and_spearman(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {
        "pearson": float(pearsonr(predicted, labels)[0]),
        "spearmanr": float(spearmanr(predicted, labels)[0]),
    }


def mean_squared_error(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"mse": float(np.mean((predicted - labels) ** 2))}


LOCAL_METRICS: dict[str, Metric] = {
    "cola": matthews_correlation,
    "mnli": accuracy,
    "mrpc": accuracy_and_f1,
    "qnli": accuracy,
    "qqp": accuracy_and_f1,
    "rte": accuracy,
    "sst2": accuracy,
    "stsb": pearson_and_spearman,
}


def load_metric(task_name: str | None, is_regression: bool = False) -> tuple[Metric, str]:
    """The metric of a GLUE task, and the name of what computes it.

    Args:
        task_name (`str`, *optional*): Without one, accuracy, or the mean squared error of a regression.
        is_regression (`bool`): What the labels are, without a task.
    """
    if task_name is None:
        return (mean_squared_error, "numpy") if is_regression else (accuracy, "scikit-learn")
    try:
        import evaluate

        metric = evaluate.load("glue", task_name)
    except (ImportError, OSError) as error:
        # the definitions are those of evaluate's GLUE metric; tests compare the numbers
        logger.warning(f"evaluate's GLUE metric cannot be had ({error}): scikit-learn and scipy compute it.")
        return LOCAL_METRICS[task_name], "scikit-learn and scipy"
    return lambda predicted, labels: metric.compute(predictions=predicted, references=labels), "evaluate"
