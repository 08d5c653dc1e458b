"""Code that loads a saved set and trains a network on it, to be pasted."""

from __future__ import annotations

import json

TRAINING = """import torch
from datasets import load_dataset
from torch import nn

rows = load_dataset({location}, {name}, split="train").with_format("torch")
net = nn.Sequential(  # any network
    nn.Conv2d(3, 64, 3, padding=1),
    nn.ReLU(),
    nn.MaxPool2d(2),
    nn.Conv2d(64, 64, 3, padding=1),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(4),
    nn.Flatten(),
    nn.Linear(1024, {classes}),
)
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
for epoch in range(50):
    for batch in torch.utils.data.DataLoader(rows, batch_size=64, shuffle=True):
        losses = nn.functional.cross_entropy(net(batch["image"] / 255), batch["label"], reduction="none")
        loss = (losses * batch["weight"]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
print(f"loss of the last batch: {{loss.item():.3f}}")
"""


def training_snippet(location: str, config_name: str, classes: int) -> str:
    """Python code that trains on a set with its weights.

    Args:
        location: folder of sets, or repository.
        config_name: of the set.
        classes: number of classes.
    """
    quoted = (json.dumps(text, ensure_ascii=False) for text in (location, config_name))
    return TRAINING.format(location=next(quoted), name=next(quoted), classes=classes)
