"""The two networks of NVAE (Vahdat and Kautz 2020, arXiv:2007.03898, section 3 and figure 2).

The bottom-up network reads the image. The top-down network draws the groups of latent variables z_1, ..., z_L, each
with a prior p(z_l | z_<l) and a posterior q(z_l | x, z_<l), and is shared by inference and generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from bessemer.nn.convolutions import WNConv2d
from bessemer.nn.masked import AutoregressiveShift
from bessemer.nn.norm import statistics_not_counted
from bessemer.nn.normal import Normal, residual
from bessemer.nn.weight_penalty import SpectralPenalty
from bessemer.systems.autoencoding.nvae_cells import DecoderCell, EncoderCell

if TYPE_CHECKING:
    from bessemer.systems.autoencoding.nvae import NVAEConfig

__all__ = ["Draw", "NVAENetwork"]


@dataclass(frozen=True)
class Draw:
    """A draw of one group from its posterior; everything per image, [N] in nats."""

    kl: Tensor
    """KL(q ‖ p): in closed form, or log q - log p of the draw where a flow is part of q."""
    log_q: Tensor
    """log q(z | x, z_<l) of the draw."""
    log_p: Tensor
    """log p(z | z_<l) of the draw."""


class _Learned(nn.Module):
    """h, the learned feature map that the top-down network starts from."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(channels, size, size))

    def forward(self, n: int) -> Tensor:
        return self.value.expand(n, -1, -1, -1)


class _Stack(nn.Sequential):
    """Cells one after the other. With `recompute`, each keeps its input alone and is run again in the backward pass."""

    def __init__(self, cells: list[nn.Module], *, recompute: bool) -> None:
        super().__init__(*cells)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for cell in self:
            if self.recompute and torch.is_grad_enabled():
                # The second run must not count the slice's statistics again. Cells draw no random numbers.
                x = checkpoint(
                    cell,
                    x,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    context_fn=lambda: (nullcontext(), statistics_not_counted()),
                )
            else:
                x = cell(x)
        return x


class _Group(nn.Module):
    """One group z_l and its place in the top-down network.

    Args:
        c: configuration.
        channels: of the feature maps at this scale.
        first: the group at the top, which has the prior N(0, 1) and sees the encoder only.
    """

    def __init__(self, c: NVAEConfig, channels: int, *, first: bool) -> None:
        super().__init__()
        z = c.latent_channels
        self.first, self.latent_channels = first, z
        if not first:
            cells: list[nn.Module] = [DecoderCell(channels, channels, se=c.se) for _ in range(c.decoder_cells)]
            self.cells = _Stack(cells, recompute=c.recompute)
            self.prior = nn.Sequential(nn.ELU(), WNConv2d(channels, 2 * z, 1))
            self.from_decoder = WNConv2d(channels, channels, 1)
        self.posterior = WNConv2d(channels, 2 * z, 3)
        self.flows = nn.ModuleList(
            AutoregressiveShift(z, mirror=mirror) for _ in range(c.flows) for mirror in (False, True)
        )
        self.combine = WNConv2d(channels + z, channels, 1)

    def prepare(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Run the group's own cells on s: the new s, and unbounded μ and log σ of the prior [N, 2C, H, W]."""
        if self.first:
            return s, s.new_zeros(s.shape[0], 2 * self.latent_channels, *s.shape[2:])
        s = self.cells(s)
        return s, self.prior(s)

    def infer(self, s: Tensor, prior: Tensor, features: Tensor, noise: Tensor) -> tuple[Tensor, Draw]:
        """Draw z from the posterior (eq. 2), given the encoder's features of this group and noise like z."""
        if not self.first:
            features = features + self.from_decoder(s)
        q, p = residual(prior, self.posterior(features)), self.prior_of(prior)
        z = q.at(noise)
        log_q = q.log_prob(z).sum((1, 2, 3))  # shifts keep the volume: the flow leaves log q as it is
        for flow in self.flows:
            z = flow(z)
        log_p = p.log_prob(z).sum((1, 2, 3))
        kl = log_q - log_p if len(self.flows) else q.kl(p).sum((1, 2, 3))
        return z, Draw(kl, log_q, log_p)

    def prior_of(self, prior: Tensor, temperature: float = 1.0) -> Normal:
        """p(z_l | z_<l), its σ multiplied by `temperature`."""
        mu, log_sigma = prior.chunk(2, dim=1)
        if self.first:
            return Normal(mu, torch.full_like(mu, temperature))
        return Normal.bounded(mu, log_sigma, temperature)

    def join(self, s: Tensor, z: Tensor) -> Tensor:
        """The feature map that later groups see: s and z combined."""
        out: Tensor = self.combine(torch.cat([s, z.to(s.dtype)], 1))
        return out


class NVAENetwork(nn.Module):
    """Encoder and decoder: images [N, channels, R, R] in [-1, 1] -> parameters of p(x | z)."""

    def __init__(self, c: NVAEConfig, out_channels: int) -> None:
        super().__init__()
        self.resolution, self.padded = c.resolution, c.padded_resolution
        width = c.width
        self.stem = WNConv2d(c.channels, width, 3)
        cells: list[nn.Module] = []
        for _ in range(c.process_blocks):
            cells += [EncoderCell(width, width, se=c.se) for _ in range(c.process_cells - 1)]
            cells.append(EncoderCell(width, 2 * width, down=True, se=c.se))
            width *= 2
        self.preprocess = _Stack(cells, recompute=c.recompute)

        self.encoder = nn.ModuleList()  # cells of one group each, from the image upwards
        self.downs = nn.ModuleList()
        for scale, groups in enumerate(c.groups):
            for _ in range(groups):
                cells = [EncoderCell(width, width, se=c.se) for _ in range(c.encoder_cells)]
                self.encoder.append(_Stack(cells, recompute=c.recompute))
            if scale < len(c.groups) - 1:
                self.downs.append(_Stack([EncoderCell(width, 2 * width, down=True, se=c.se)], recompute=c.recompute))
                width *= 2
        self.top = nn.Sequential(nn.ELU(), WNConv2d(width, width, 1), nn.ELU())

        size = self.padded >> (c.process_blocks + len(c.groups) - 1)
        self.start = _Learned(width, size)
        self.groups = nn.ModuleList()  # from the top downwards
        self.ups = nn.ModuleList()
        for scale, groups in enumerate(reversed(c.groups)):
            self.groups.extend(_Group(c, width, first=scale == i == 0) for i in range(groups))
            if scale < len(c.groups) - 1:
                self.ups.append(_Stack([DecoderCell(width, width // 2, up=True, se=c.se)], recompute=c.recompute))
                width //= 2
        of_scale = [(c.latent_channels, size << scale, size << scale) for scale in range(len(c.groups))]
        self.noise_shapes = [shape for shape, n in zip(of_scale, reversed(c.groups), strict=True) for _ in range(n)]
        """Of one image, for each group."""
        self.last_of_scale = {sum(c.groups[::-1][: i + 1]) - 1 for i in range(len(c.groups) - 1)}

        cells = []
        for _ in range(c.process_blocks):
            cells.append(DecoderCell(width, width // 2, expansion=3, up=True, se=c.se))
            width //= 2
            cells += [DecoderCell(width, width, expansion=3, se=c.se) for _ in range(c.process_cells - 1)]
        self.postprocess = _Stack(cells, recompute=c.recompute)
        self.image = nn.Sequential(nn.ELU(), WNConv2d(width, out_channels, 3))
        self.penalty = SpectralPenalty(self, c.power_iterations) if c.spectral else None

    def features(self, images: Tensor) -> list[Tensor]:
        """The encoder's features of each group, from the top downwards."""
        margin = (self.padded - self.resolution) // 2
        s = self.preprocess(self.stem(F.pad(images, [margin] * 4, value=-1.0)))
        found: list[Tensor] = []
        downs = iter(self.downs)
        for i, cells in reversed(list(enumerate(reversed(self.encoder)))):  # i counts from the top
            s = cells(s)
            found.append(s if i else self.top(s))
            if i - 1 in self.last_of_scale:  # the next group lies one scale further up
                s = next(downs)(s)
        return found[::-1]

    def _descend(self, n: int, draw: Callable[[_Group, Tensor, Tensor, int], Tensor]) -> Tensor:
        """Go through all groups from the top downwards, `draw` giving each its z; the parameters of p(x | z)."""
        s = self.start(n)
        ups = iter(self.ups)
        for i, group in enumerate(self._groups()):
            s, prior = group.prepare(s)
            s = group.join(s, draw(group, s, prior, i))
            if i in self.last_of_scale:
                s = next(ups)(s)
        out: Tensor = self.image(self.postprocess(s))
        margin = (self.padded - self.resolution) // 2
        return out[:, :, margin : margin + self.resolution, margin : margin + self.resolution]

    def _groups(self) -> Iterator[_Group]:
        for group in self.groups:
            assert isinstance(group, _Group)
            yield group

    def draw_noise(self, n: int, generator: Generator) -> list[Tensor]:
        """Noise N(0, 1) for every group, from the top downwards: [n, latent_channels, R, R] each.

        Drawn before the networks run, so that these are functions of tensors, which can be compiled as a whole.
        """
        return [torch.randn((n, *shape), generator=generator, device=generator.device) for shape in self.noise_shapes]

    def forward(self, images: Tensor, noise: Sequence[Tensor]) -> tuple[Tensor, list[Draw]]:
        """Draw z from q(z | x), with `noise` of :meth:`draw_noise`.

        Returns:
            Parameters of p(x | z) [N, out_channels, R, R], and what each group drew, from the top downwards.
        """
        features = self.features(images)
        draws: list[Draw] = []

        def posterior(group: _Group, s: Tensor, prior: Tensor, i: int) -> Tensor:
            z, draw = group.infer(s, prior, features[i], noise[i])
            draws.append(draw)
            return z

        return self._descend(images.shape[0], posterior), draws

    def generate(self, noise: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        """Parameters of p(x | z) for z from the prior, the σ of every group multiplied by `temperature`."""
        n = noise[0].shape[0]
        return self._descend(n, lambda group, s, prior, i: group.prior_of(prior, temperature).at(noise[i]))
