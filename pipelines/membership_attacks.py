"""Membership inference attacks on the outputs of a network."""

from __future__ import annotations

import frepo_sets
import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from dq.data.zca import Whitening
from dq.refine.method import RealImages

ATTACKERS = {
    "logistic regression": lambda seed: LogisticRegression(max_iter=1000),
    "random forest": lambda seed: RandomForestClassifier(min_samples_leaf=5, random_state=seed),
    "k nearest neighbors": lambda seed: KNeighborsClassifier(n_neighbors=21),
    "MLP": lambda seed: MLPClassifier((64,), early_stopping=True, random_state=seed),
}


@torch.no_grad()
def outputs(net: nn.Module, real: RealImages, whitening: Whitening) -> np.ndarray:
    """Outputs of a network in evaluation mode and its squared-error loss, (N, C + 1)."""
    net.eval()
    device = next(net.parameters()).device
    y = torch.cat([net(whitening(x.to(device))).cpu() for x in real.images.split(500)])
    loss = 0.5 * (y - frepo_sets.with_targets(real, y.shape[1])[1]).square().sum(1, keepdim=True)
    return torch.cat([y, loss], 1).numpy()


def loss_auc(members: np.ndarray, others: np.ndarray) -> float:
    """Area under the ROC curve of -loss as a score of membership.

    The loss is the last column of rows of `outputs`; nothing is fitted.
    """
    scores = -np.concatenate([members[:, -1], others[:, -1]])
    return float(roc_auc_score(np.repeat([1, 0], [len(members), len(others)]), scores))


def attack(members: np.ndarray, others: np.ndarray, seed: int) -> dict[str, tuple[float, float]]:
    """AUC and accuracy of every attack.

    Attacks are fitted on a random half of both populations and tested on the other halves.

    Args:
        members: rows (N, C + 1) of `outputs` for images of the training.
        others: rows (M, C + 1) for other images.
        seed: of the halves and of the attackers.
    """
    draw = np.random.default_rng(seed)
    halves = [np.array_split(rows[draw.permutation(len(rows))], 2) for rows in (members, others)]
    x, x_test = (np.concatenate([h[i] for h in halves]) for i in (0, 1))
    y, y_test = (np.repeat([1, 0], [len(h[i]) for h in halves]) for i in (0, 1))
    false_rate, true_rate, thresholds = roc_curve(y, -x[:, -1])
    # scores of the test halves, and the score from which an image counts as a member
    scores = {"threshold on the loss": (-x_test[:, -1], thresholds[np.argmax(true_rate - false_rate)])}
    for name, make in ATTACKERS.items():
        model = make_pipeline(StandardScaler(), make(seed)).fit(x, y)
        scores[name] = (model.predict_proba(x_test)[:, 1], 0.5)
    return {k: (float(roc_auc_score(y_test, s)), float(((s >= t) == y_test).mean())) for k, (s, t) in scores.items()}


if __name__ == "__main__":
    raise SystemExit("membership_attacks is a module of membership_inference.py; run that")
