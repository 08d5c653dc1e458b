"""How good a distilled set is: students trained on it, tested on real images, beside real images of equal number."""

from dq.evaluation.evaluate import evaluate

__all__ = ["evaluate"]
