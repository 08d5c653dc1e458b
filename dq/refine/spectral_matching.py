"""Spectral matching: equal characteristic functions of features of classes.

Wang et al., "Dataset Distillation with Neural Characteristic Function: A Minmax Perspective" (NCFM), CVPR 2025, arXiv
2502.20653. Departures from the released code: images move by the SGD of the shared loop instead of AdamW and stay
unclipped; networks are freshly drawn unless `experts` are given, from whose path they are drawn as published; there is
no loss of a trained network's predictions (calibration) and no image that holds four of half the size; frequencies are
drawn once a step for all classes, each from noise of its own, and their network is trained once a step; its batch norm
has no weights.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from dq.config.condensation import SpectralMatching
from dq.core.errors import InputError
from dq.core.files import read_json
from dq.core.seeds import derive_seed, generator, seeded
from dq.networks.flat_parameters import FlatNet
from dq.networks.trajectories import MANIFEST, Experts
from dq.networks.zoo import make_net
from dq.refine.class_matching import (
    ClassBatches,
    ClassMatchingMethod,
    Gradient,
    class_gradients,
    class_rows,
    image_shares,
    learn_images,
)
from dq.refine.distribution_matching import block_features, block_outputs
from dq.refine.method import Batch, Context, Needs, Refined, Resources, Session
from dq.refine.momentum import Learned

SCALE = 300.0  # of the loss, as released
TINY = 1e-12  # under the root, whose gradient at 0 is infinite
LAYERS, SLOPE = 3, 0.2  # of the network of frequencies; of its leaky ReLU


def resolve(config: SpectralMatching, context: Context) -> SpectralMatching:
    """Check the settings.

    Raises:
        InputError: for a network that gathers statistics over batches, has no pooled blocks, or is not the experts'.
    """
    if config.experts is not None:
        name = read_json(Path(config.experts) / MANIFEST)["facts"]["net"]
        if name != config.net:
            raise InputError(
                f"the experts in {config.experts} are {name}, but spectral has net={config.net}; train others, or set "
                f"net={name}"
            )
    net = FlatNet(config.net, context.classes or 2, context.side).net
    with block_outputs(net, None):
        return config


def characteristic(features: Tensor, frequencies: Tensor, shares: Tensor | None = None) -> Tensor:
    """Empirical characteristic function Phi(t) = sum_j shares_j exp(i <t, f_j>), (k,).

    Args:
        features: (m, d) f.
        frequencies: (k, d) t.
        shares: (m,) of the features, which sum to 1; None: 1/m each.
    """
    angles = features @ frequencies.T  # (m, k)
    waves = torch.complex(angles.cos(), angles.sin())
    return waves.mean(0) if shares is None else (shares[:, None] * waves).sum(0)


def distance(real: Tensor, learned: Tensor, amplitude: float, phase: float) -> Tensor:
    """Discrepancy of characteristic functions Phi_r of real and Phi_s of learned features.

        L = 300 mean_t sqrt( alpha (|Phi_r| - |Phi_s|)^2 + 2 beta (|Phi_r| |Phi_s| - Re Phi_r conj(Phi_s)) )

    Args:
        real: (k,) complex, Phi_r.
        learned: (k,) complex, Phi_s at the same frequencies t.
        amplitude: weight alpha.
        phase: weight beta.
    """
    of_amplitude = (real.abs() - learned.abs()).square()
    # 2 (|r| |s| - Re r s*) = |r - s|^2 - (|r| - |s|)^2, which is exact where both are nearly equal
    of_phase = ((real - learned).abs().square() - of_amplitude).clamp(min=0)
    return SCALE * (amplitude * of_amplitude + phase * of_phase + TINY).sqrt().mean()


def frequency_network(size: int, seed: int) -> nn.Sequential:
    """Network from normal noise (k, size) to frequencies in [-1, 1], for k > 1."""
    layers: list[nn.Module] = []
    with seeded(seed):
        for i in range(LAYERS):
            norm = nn.BatchNorm1d(size, affine=False, track_running_stats=False)
            layers += [nn.Linear(size, size, bias=False), norm, nn.LeakyReLU(SLOPE) if i < LAYERS - 1 else nn.Tanh()]
    return nn.Sequential(*layers)


class Frequencies:
    """Frequencies of every step, normal or of an adversarial network."""

    def __init__(self, config: SpectralMatching, size: int, seed: int, device: torch.device) -> None:
        """Draw the network, if any, for feature vectors of `size`."""
        self.config, self.size, self.seed, self.device = config, size, seed, device
        self.net: nn.Sequential | None = None
        if config.sampler == "network":
            self.net = frequency_network(size, derive_seed(seed, "frequencies")).to(device)
        self.parameters = [] if self.net is None else list(self.net.parameters())

    def draw(self, step: int, carried: dict[str, Tensor]) -> Tensor:
        """Frequencies (k, d) of a step.

        With a graph if a network makes them, whose parameters are in `carried`.
        """
        draws = generator(self.seed, "frequencies", step)
        t = torch.randn(self.config.frequencies, self.size, generator=draws).to(self.device)
        if self.net is None:
            return t
        if "frequencies.value" in carried:
            vector_to_parameters(carried["frequencies.value"], self.parameters)
        with torch.enable_grad():
            return self.net(t)

    def learn(self, t: Tensor, gradient: Tensor, carried: dict[str, Tensor]) -> None:
        """Move the network uphill by SGD.

        Args:
            t: (k, d) of `draw`.
            gradient: (k, d) of the loss with respect to t.
            carried: tensors from step to step.
        """
        uphill = parameters_to_vector(torch.autograd.grad(t, self.parameters, gradient))
        value = parameters_to_vector(self.parameters).detach()
        theta = Learned(value, carried.get("frequencies.velocity", torch.zeros_like(value)))
        theta.step(-uphill, self.config.sampler_lr, self.config.momentum)
        carried["frequencies.value"], carried["frequencies.velocity"] = theta.value, theta.velocity


def features_at(net: nn.Module, x: Tensor) -> Tensor:
    """Last pooled maps of images (B, 3, S, S) as vectors of length 1, (B, d)."""
    return F.normalize(block_features(net, x, None)[-1].flatten(1), dim=1)


def draw_network(config: SpectralMatching, classes: int, side: int, experts: Experts | None, seed: int) -> nn.Module:
    """Draw a network: fresh, or between an expert's first and last parameters.

    The point between them is random.
    """
    net = make_net(config.net, classes, side, seed=seed)
    if experts is not None:
        draws = generator(seed, "expert")
        expert = int(torch.randint(experts.number, (), generator=draws))
        first, last = (experts.parameters(expert, epoch) for epoch in (0, experts.epochs))
        vector_to_parameters(torch.lerp(first, last, float(torch.rand((), generator=draws))), net.parameters())
    return net.requires_grad_(False)


def refine(batch: Batch, config: SpectralMatching, resources: Resources, session: Session | None = None) -> Refined:
    """Learn the images of a set by spectral matching; see `learn_images`.

    In every step, with a network f, frequencies t and the same augmentation a on both sides, the images move along the
    gradient of

        L = sum_c distance(Phi_t(f(a(real images of c))), Phi_t(f(a(learned images of c))))

    and the network that t comes from, if there is one, moves against it. With `config.weighted` the weights of the
    batch weigh the images in Phi.

    Raises:
        InputError: if experts are missing, or of another network, number of classes or size of images.
    """
    session, side = session or Session(), batch.images.shape[-1]
    seed = session.seed
    classes, experts, device = resources.classes, resources.experts, resources.device
    resolve(config, Context(side, 0, classes=classes))
    check_experts(config, experts, classes, side)
    shares = image_shares(config, batch)[1].to(device)
    rows = class_rows(batch.labels, device)
    width = features_at(draw_network(config, classes, side, None, 0), torch.zeros(1, 3, side, side)).shape[1]
    frequencies = Frequencies(config, width, seed, device)

    def gradient_of(batches: ClassBatches) -> Gradient:
        def gradient(x: Tensor, step: int, carried: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            net = draw_network(config, classes, side, experts, derive_seed(seed, "network", step)).to(device)
            drawn = frequencies.draw(step, carried)
            learns = drawn.requires_grad
            t = drawn.detach().requires_grad_(learns)

            def loss_of(c: int, part: Tensor) -> Tensor:
                of_real = characteristic(features_at(net, batches.images(c, step, device)), t)
                learned = features_at(net, batches.augment(part, c, step))
                of_learned = characteristic(learned, t, shares[rows[c]])
                return distance(of_real, of_learned, config.amplitude, config.phase)

            loss, g, g_shared = class_gradients(loss_of, x, rows, [t] if learns else [])
            if learns:
                frequencies.learn(drawn, g_shared[0], carried)
            return loss, g

        return gradient

    return learn_images(batch, config, config.steps, resources, gradient_of, session)


def check_experts(config: SpectralMatching, experts: Experts | None, classes: int, side: int) -> None:
    """Check that experts are there if named, and fit the set.

    Raises:
        InputError: if not.
    """
    if (config.experts is None) != (experts is None):
        raise InputError("spectral needs `Resources.experts` if `experts` names their folder, and else none")
    if experts is not None:
        net = experts.net
        if (net.classes, net.side) != (classes, side):
            raise InputError(
                f"the experts in {experts.folder} saw {net.classes} classes and images of {net.side} px, but the set "
                f"has {classes} classes and {side} px; train experts on such images"
            )


class SpectralMethod(ClassMatchingMethod):
    """Spectral matching as a stage of a run."""

    config = SpectralMatching
    refine = staticmethod(refine)

    def resolve(self, stage: SpectralMatching, context: Context) -> SpectralMatching:
        return resolve(stage, context)

    def needs(self, stage: SpectralMatching) -> Needs:
        return dataclasses.replace(super().needs(stage), experts=stage.experts)
