"""Pools of weak teachers (Teddy): early checkpoints or pruned copies."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dq.core.errors import InputError
from dq.core.files import read_json, read_tensors
from dq.core.plain import PlainDict
from dq.core.seeds import derive_seed, digest_of, digest_of_tensors
from dq.networks.teacher import Teacher, pooled_logits
from dq.networks.zoo import move_net, net_of_weights

MANIFEST = "pool.json"


@dataclass(frozen=True)
class TeacherPool:
    """Teachers of one folder of `dq train-pool`, in evaluation mode."""

    members: tuple[Teacher, ...]  # within the window of accuracies
    base: Teacher | None  # the fully trained network, which labels and is not matched
    facts: PlainDict  # of the manifest

    @staticmethod
    def load(folder: str | Path, *, batch_size: int = 256, device: torch.device | str = "cpu") -> TeacherPool:
        """Open a pool.

        Every teacher's weight in a mean is its accuracy on validation images.

        Raises:
            InputError: if the folder holds no finished pool, or one without usable members.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise InputError(f"{folder} holds no finished pool (no {MANIFEST}); make one with `dq train-pool`")
        facts = read_json(folder / MANIFEST)
        used = [m for m in facts["members"] if m["used"]]
        if not used:
            raise InputError(f"no member of the pool {folder} is within its window of accuracies; make another")
        base = facts["base"] if facts["keep_base"] else None
        return TeacherPool(
            tuple(_member(folder, m, facts, batch_size, device) for m in used),
            None
            if base is None
            else dataclasses.replace(_member(folder, base, facts, batch_size, device), matched=False),
            facts,
        )

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """Members and base, all of which label."""
        return (*self.members, *([] if self.base is None else [self.base]))

    def sample(self, step: int, seed: int) -> Teacher:
        """Draw the member of a step uniformly, from (seed, step) alone."""
        return self.members[member_of_step(step, len(self.members), seed)]

    def ensemble_logits(self, images: Tensor) -> Tensor:
        """Return mean logits (N, C) float32 of all teachers, weighted by accuracy, for images (N, 3, S, S)."""
        return pooled_logits(self.teachers, images)


def member_of_step(step: int, members: int, seed: int) -> int:
    """Draw the index of a step's teacher uniformly, from (seed, step) alone."""
    return random.Random(derive_seed(seed, "teacher", step)).randrange(members)


def _member(folder: Path, record: PlainDict, facts: PlainDict, batch_size: int, device: torch.device | str) -> Teacher:
    state, _ = read_tensors(folder / record["file"])
    net = net_of_weights(facts["net"], len(facts["classes"]), facts["image_size"], state)
    resize_to(net, state)
    net = net.eval().requires_grad_(False)
    move_net(net, device)
    mean, std = tuple(facts["mean"]), tuple(facts["std"])
    digest = digest_of([facts["net"], digest_of_tensors(state), mean, std, record["accuracy"]])
    name = f"{facts['net']}:{record['name']}"
    return Teacher(net, mean, std, batch_size, digest, name, weight=max(record["accuracy"], 1e-6))


def resize_to(net: nn.Module, state: dict[str, Tensor]) -> None:
    """Load the weights of a structurally pruned copy of a network in place.

    Layers take the shapes of `state`.

    Raises:
        InputError: if the names differ.
    """
    expected = net.state_dict()
    if expected.keys() != state.keys():
        strange = sorted(expected.keys() ^ state.keys())
        raise InputError(
            f"the weights are not of this network: {strange[0]!r} is in one of them only; if an earlier version of dq "
            "saved them, make them again (`dq train-pool`, `dq train-teachers`)"
        )
    for name, module in net.named_modules():
        for key, old in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            new = state[f"{name}.{key}" if name else key]
            if old.shape != new.shape:
                fresh = new.new_empty(new.shape, dtype=old.dtype)
                setattr(module, key, nn.Parameter(fresh) if isinstance(old, nn.Parameter) else fresh)
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Conv2d):
            depthwise = module.groups > 1 and module.groups == module.in_channels
            module.out_channels = weight.shape[0]  # type: ignore[union-attr]
            if depthwise:
                module.groups = module.out_channels
            module.in_channels = weight.shape[1] * module.groups  # type: ignore[union-attr]
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape  # type: ignore[union-attr]
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features = len(module.running_mean)  # type: ignore[arg-type]
    net.load_state_dict(state)


@torch.no_grad()
def reestimate_bn(net: nn.Module, batches: Sequence[Tensor]) -> None:
    """Replace the running statistics of batch norm by cumulative averages.

    An exponential average at momentum 0.1 covers a few dozen batches, of weights that were changing. The network ends
    in evaluation mode. Batches are normalized images (B, 3, S, S) on the network's device; all count alike, whatever
    their size.
    """
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    net.eval()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # cumulative
        m.train()
    try:
        for x in batches:
            net(x)
    finally:
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
        net.eval()
