"""Pool of networks trained online on a changing set (FRePo).

Zhou et al. 2022, arXiv 2206.00719, as released. Random numbers come from streams of one seed: initial weights from
a network's index and generation, the choice of a network and the rows of its training step from the step's number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dq.core.errors import InputError
from dq.core.plain import PlainDict, PlainMapping
from dq.core.seeds import derive_seed, generator
from dq.networks.classic import Norm
from dq.networks.teacher import evaluation_mode, head_inputs
from dq.networks.zoo import has_norm_choice, make_net, move_net

# Share of the batch in the running statistics. Flax's momentum of 0.1 is the share of the old ones, PyTorch's that of
# the new: with 0.1 here, features in evaluation mode would lag until the network is replaced.
BATCH_NORM_MOMENTUM = 0.9
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of Adam


@dataclass
class Member:
    """Network of a pool with its optimizer."""

    net: nn.Module
    optimizer: torch.optim.Adam
    counter: int  # training steps, plus an initial offset that spreads the resets
    generation: int = 0  # number of networks replaced at this index


@dataclass(frozen=True)
class PoolSettings:
    """Size of a pool and training of its networks."""

    size: int = 10
    max_online: int = 100  # a network whose counter is larger is replaced
    lr: float = 3e-4  # of Adam, constant
    batch_size: int = 1000  # images of a training step; all, if there are fewer
    norm: Norm | None = "batch"  # of networks that have one


class OnlinePool:
    """Networks of one or several architectures, each at its own stage of training."""

    def __init__(
        self,
        nets: Sequence[str],
        num_classes: int,
        image_size: int,
        settings: PoolSettings | None = None,
        *,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Make fresh networks.

        Network i is the (i mod len(nets))-th of `nets`, names for `make_net`, and starts at step
        i (max_online // size) without having been trained, so that the resets are spread.

        Raises:
            InputError: for an unknown network, or an empty pool.
        """
        self.settings = settings or PoolSettings()
        size = self.settings.size
        if not nets or size < 1:
            raise InputError("a pool of networks needs at least one; set nets and pool_size")
        self.nets, self.classes, self.side = tuple(nets), num_classes, image_size
        self.seed, self.device = seed, torch.device(device)
        self.members = [self._fresh(i, 0, i * (self.settings.max_online // size)) for i in range(size)]

    def _fresh(self, i: int, generation: int, counter: int) -> Member:
        seed = derive_seed(self.seed, "online network", i, generation)
        name = self.nets[i % len(self.nets)]
        norm = self.settings.norm if has_norm_choice(name) else None
        net = make_net(name, self.classes, self.side, norm=norm, seed=seed)
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.momentum = BATCH_NORM_MOMENTUM
        move_net(net, self.device)
        return Member(net, torch.optim.Adam(net.parameters(), lr=self.settings.lr), counter, generation)

    def pick(self, step: int) -> int:
        """Draw the network of a step uniformly."""
        return int(torch.randint(len(self.members), (), generator=generator(self.seed, "online pick", step)))

    @contextlib.contextmanager
    def features(self, i: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """Provide the features of network i as a function within the block.

        They are the last layer's inputs in evaluation mode, (B, 3, S, S) -> (B, d). Parameters get no gradients.
        """
        net = self.members[i].net
        with evaluation_mode(net), head_inputs(net) as inputs, _frozen(net):

            def features(x: Tensor) -> Tensor:
                inputs.clear()
                net(x)
                return inputs.pop().flatten(1)

            yield features

    def advance(
        self, i: int, images: Tensor, labels: Tensor, step: int, weights: Tensor | None = None
    ) -> Tensor | None:
        """Train network i by a step on the set, or replace it.

        A step is one of Adam on half the squared error summed over classes, without augmentation, on at most
        `batch_size` images.

        Args:
            i: index of the network.
            images: (n, 3, S, S) as networks see them.
            labels: (n, C) regression targets.
            step: number of the step, for the draw of the batch.
            weights: (n,) of the images, mean 1; None: all alike.

        Returns:
            The loss, (); None if the network was replaced.
        """
        member = self.members[i]
        # > and not >=, as released: a network is used max_online + 2 times
        if member.counter > self.settings.max_online:
            self.members[i] = self._fresh(i, member.generation + 1, 0)
            return None
        batch_size = self.settings.batch_size
        if len(images) > batch_size:
            rows = torch.randperm(len(images), generator=generator(self.seed, "online batch", step))
            rows = rows[:batch_size].to(images.device)
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

    def state(self) -> tuple[dict[str, Tensor], PlainDict]:
        """Return tensors and plain data from which `restore` resumes bit for bit."""
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

    def restore(self, tensors: Mapping[str, Tensor], facts: PlainMapping) -> None:
        """Restore a state returned by `state` of a pool with the same settings."""
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
                member.optimizer.state[p] = dict(zip(MOMENTS, (step.clone(), *moments), strict=True))


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
