"""A convolutional gated recurrent unit over the frames of clips."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bessemer.nn.spectral import SNConv2d

__all__ = ["ConvGRU"]


class ConvGRU(nn.Module):
    """GRU whose products are 3×3 convolutions (Ballas et al. 2016, arXiv:1511.06432), as DVD-GAN has it.

        r_t = σ(W_r ⋆ [x_t; h_{t-1}] + b_r)
        u_t = σ(W_u ⋆ [x_t; h_{t-1}] + b_u)
        c_t = ρ(W_c ⋆ [x_t; r_t ⊙ h_{t-1}] + b_c)
        h_t = u_t ⊙ h_{t-1} + (1 - u_t) ⊙ c_t

    with h_0 = 0 and ρ = ReLU (Clark, Donahue and Simonyan 2019, arXiv:1907.06571, appendix A.2). Each W is spectrally
    normalised as a whole.

    Args:
        channels: of x and of h.
        eps: smallest norm in the power iteration.
    """

    def __init__(self, channels: int, *, eps: float = 1e-12) -> None:
        super().__init__()
        self.channels = channels
        self.reset, self.update, self.candidate = (SNConv2d(2 * channels, channels, eps=eps) for _ in range(3))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Unroll.

        Args:
            x: [N, T, C, H, W], or [N, 1, C, H, W] where every frame has the same input.
            frames: T.

        Returns:
            h_1 to h_T, [N, T, C, H, W].
        """
        layers = (self.reset, self.update, self.candidate)
        # W ⋆ [x; h] is a sum: its part in x does not wait for h, and is taken of all frames together.
        weights = [torch.split(layer.effective_weight(), self.channels, 1) for layer in layers]
        of_x, of_h = zip(*weights, strict=True)
        bias = torch.cat([layer.bias for layer in layers if layer.bias is not None])
        inputs = F.conv2d(x.flatten(0, 1), torch.cat(of_x), bias, padding=1)
        inputs = inputs.view(*x.shape[:2], *inputs.shape[1:]).expand(-1, frames, -1, -1, -1)
        gates, (h, states) = torch.cat(of_h[:2]), (torch.zeros_like(inputs[:, 0, : self.channels]), list[Tensor]())
        for t in range(frames):
            of_gates, of_candidate = torch.split(inputs[:, t], [2 * self.channels, self.channels], 1)
            r, u = torch.sigmoid(of_gates + F.conv2d(h, gates, padding=1)).chunk(2, 1)
            c = F.relu(of_candidate + F.conv2d(r * h, of_h[2], padding=1))
            h = u * h + (1 - u) * c
            states.append(h)
        return torch.stack(states, 1)
