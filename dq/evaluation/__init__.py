"""How good a distilled set is: students trained on it, tested on real images, beside real images of equal number."""

from dq.evaluation.stage import evaluate

__all__ = ["evaluate"]
