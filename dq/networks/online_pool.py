"""A pool of networks that are trained on a changing set, a step at a time, and replaced after some steps (FRePo).

Zhou et al. 2022, arXiv 2206.00719, as released. Random numbers come from streams of one seed: initial weights from
a network's place and generation, the choice of a network and the rows of its training step from the step's number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dq.core.errors import InputError
from dq.core.seeds import derive_seed, generator
from dq.networks.classic import Norm
from dq.networks.teacher import evaluation_mode, head_inputs
from dq.networks.zoo import has_norm_choice, make_net, move_net

# Share of the batch in the running statistics. Flax's momentum of 0.1 is the share of the old ones, PyTorch's that of
# the new: with 0.1 here, features in evaluation mode would lag through the whole life of a network.
BATCH_NORM_MOMENTUM = 0.9
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of Adam


@dataclass
class Member:
    """A network of the pool."""

    net: nn.Module
    optimizer: torch.optim.Adam
    counter: int  # training steps, and at first an offset that spreads the resets
    generation: int = 0  # networks that were here before


class OnlinePool:
    """Networks of one or several architectures, each at its own stage of training."""

    def __init__(
        self,
        nets: Sequence[str],
        num_classes: int,
        image_size: int,
        *,
        size: int = 10,
        max_online: int = 100,
        lr: float = 3e-4,
        batch_size: int = 1000,
        norm: Norm | None = "batch",
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make `size` fresh networks; network i is the (i mod len(nets))-th of `nets` and starts at step
        i (max_online // size) without having been trained, so that the resets are spread.

        Args:
            nets: names for `make_net`.
            max_online: a network whose counter is larger than this is replaced.
            lr: of Adam, constant.
            batch_size: images of a training step; all, if there are fewer.
            norm: of networks that have one.

        Raises:
            InputError: for an unknown network, or an empty pool.
        """
        if not nets or size < 1:
            raise InputError("a pool of networks needs at least one; set nets and pool_size")
        self.nets, self.classes, self.side = tuple(nets), num_classes, image_size
        self.max_online, self.lr, self.batch_size, self.norm = max_online, lr, batch_size, norm
        self.seed, self.device = seed, torch.device(device)
        self.members = [self._fresh(i, 0, i * (max_online // size)) for i in range(size)]

    def _fresh(self, i: int, generation: int, counter: int) -> Member:
        seed = derive_seed(self.seed, "online network", i, generation)
        name = self.nets[i % len(self.nets)]
        norm = self.norm if has_norm_choice(name) else None
        net = make_net(name, self.classes, self.side, norm=norm, seed=seed)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = BATCH_NORM_MOMENTUM
        move_net(net, self.device)
        return Member(net, torch.optim.Adam(net.parameters(), lr=self.lr), counter, generation)

    def pick(self, step: int) -> int:
        """Which network a step uses, drawn uniformly."""
        return int(torch.randint(len(self.members), (), generator=generator(self.seed, "online pick", step)))

    @contextlib.contextmanager
    def features(self, i: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """The last layer's inputs of network i in evaluation mode, as a function (B, 3, S, S) -> (B, d) within the
        block. Parameters get no gradients."""
        net = self.members[i].net
        with evaluation_mode(net), head_inputs(net) as seen, _frozen(net):

            def features(x: Tensor) -> Tensor:
                seen.clear()
                net(x)
                return seen.pop().flatten(1)

            yield features

    def advance(
        self, i: int, images: Tensor, labels: Tensor, step: int, weights: Tensor | None = None
    ) -> Tensor | None:
        """Train network i by a step on the set, or replace it: by half the squared error summed over classes, with
        Adam and without augmentation, on at most `batch_size` images.

        Args:
            images: (n, 3, S, S) as networks see them.
            labels: (n, C) regression targets.
            weights: (n,) of the images, mean 1; None: all alike.

        Returns:
            The loss, (); None if the network was replaced.
        """
        member = self.members[i]
        if member.counter > self.max_online:  # > and not >=, as released: a network serves max_online + 2 times
            self.members[i] = self._fresh(i, member.generation + 1, 0)
            return None
        if len(images) > self.batch_size:
            rows = torch.randperm(len(images), generator=generator(self.seed, "online batch", step))
            rows = rows[: self.batch_size].to(images.device)
            images, labels, weights = images[rows], labels[rows], None if weights is None else weights[rows]
        member.net.train()
        member.optimizer.zero_grad()
        with torch.enable_grad():
            losses = 0.5 * (member.net(images.detach()) - labels.detach()).square().sum(1)
            loss = (losses if weights is None else weights * losses).mean()
            loss.backward()
        member.optimizer.step()
        member.counter += 1
        return loss.detach()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain data from which `restore` goes on bit for bit."""
        tensors: dict[str, Tensor] = {}
        for i, m in enumerate(self.members):
            tensors |= {f"{i}.net.{k}": v for k, v in m.net.state_dict().items()}
            for j, p in enumerate(m.net.parameters()):
                moments = m.optimizer.state.get(p, {})
                tensors |= {f"{i}.adam.{j}.{k}": moments[k] for k in MOMENTS if k in moments}
        facts = {
            "counters": [m.counter for m in self.members],
            "generations": [m.generation for m in self.members],
        }
        return {k: v.detach().cpu().clone() for k, v in tensors.items()}, facts

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Put the pool into a state that `state` gave; its settings must be the same."""
        for i, (counter, generation) in enumerate(zip(facts["counters"], facts["generations"], strict=True)):
            member = self.members[i] = self._fresh(i, generation, counter)
            prefix = f"{i}.net."
            member.net.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
            for j, p in enumerate(member.net.parameters()):
                if f"{i}.adam.{j}.step" not in tensors:
                    continue
                step, *others = (tensors[f"{i}.adam.{j}.{k}"] for k in MOMENTS)
                # in the layout of the parameter, since vectorized products round otherwise than single ones
                moments = [torch.zeros_like(p).copy_(v) for v in others]
                member.optimizer.state[p] = dict(zip(MOMENTS, (step.clone(), *moments)))


@contextlib.contextmanager
def _frozen(net: nn.Module) -> Iterator[None]:
    learned = [p for p in net.parameters() if p.requires_grad]
    for p in learned:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learned:
            p.requires_grad_(True)
