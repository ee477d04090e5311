"""Vision transformers whose image features are compared: DINOv2 and CLIP, from the weights that their authors publish.

Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, arXiv:2010.11929; Oquab et al., DINOv2, TMLR 2024,
arXiv:2304.07193; Radford et al., CLIP, ICML 2021, arXiv:2103.00020. That Frechet distances of DINOv2's features agree
with people better than Inception's: Stein et al., Exposing flaws of generative model evaluation metrics, NeurIPS 2023,
arXiv:2306.04675. The shape of the network is read off the weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bessemer.errors import EvaluationError
from bessemer.evaluation.extractors import in_passes
from bessemer.evaluation.resize import resize_bicubic
from bessemer.evaluation.weights import check_weights, read_state

__all__ = ["Clip", "DinoV2", "VisionTransformer", "clip_transformer", "dinov2_transformer"]

State = Mapping[str, Tensor]

_HEAD: Final = 64  # channels of an attention head, in every published size of both
_SIZE: Final = 224
_PASS: Final = 16


class VisionTransformer(nn.Module):
    """Patches, a class token and blocks of attention; the class token after the last block is the feature.

    Args:
        patch: [width, 3, p, p] weights of the patch embedding, and its bias.
        tokens: [t, width] in front of the patches: the class token, and registers.
        positions: [1 + (224 / p)^2, width] of the class token and the patches.
        blocks: the blocks.
        before: applied to all tokens before the first block.
        after: applied to the class token after the last block.
    """

    def __init__(
        self,
        patch: tuple[Tensor, Tensor | None],
        tokens: Tensor,
        positions: Tensor,
        blocks: list[_Block],
        before: nn.Module,
        after: nn.Module,
    ) -> None:
        super().__init__()
        self.blocks, self.before, self.after = nn.ModuleList(blocks), before, after
        for name, tensor in (("kernel", patch[0]), ("bias", patch[1]), ("tokens", tokens), ("positions", positions)):
            self.register_buffer(name, tensor)

    kernel: Tensor
    bias: Tensor | None
    tokens: Tensor
    positions: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """[N, d] of normalised images [N, 3, 224, 224]."""
        x = F.conv2d(images, self.kernel, self.bias, stride=self.kernel.shape[-1]).flatten(2).mT
        first = self.tokens[:1] + self.positions[:1]
        front = torch.cat([first, self.tokens[1:]]).expand(len(x), -1, -1)  # registers have no position
        x = self.before(torch.cat([front, x + self.positions[1:]], dim=1))
        for block in self.blocks:
            x = block(x)
        features: Tensor = self.after(x[:, 0])
        return features


class _Block(nn.Module):
    """``x + s1 attention(norm1(x))``, then ``x + s2 mlp(norm2(x))``."""

    def __init__(self, state: State, names: Mapping[str, str], eps: float, mlp: Callable[[State], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = (_norm(state, names[n], eps) for n in ("norm1", "norm2"))
        self.qkv, self.out = (_linear(state[f"{names[n]}weight"], state[f"{names[n]}bias"]) for n in ("qkv", "out"))
        self.mlp = mlp(state)
        one = torch.ones(())
        self.register_buffer("scale1", state.get(names.get("scale1", ""), one))
        self.register_buffer("scale2", state.get(names.get("scale2", ""), one))

    scale1: Tensor
    scale2: Tensor

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, tokens, 3, width // _HEAD, _HEAD).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.scale1 * self.out(mixed)
        y: Tensor = x + self.scale2 * self.mlp(self.norm2(x))
        return y


class _QuickGelu(nn.Module):
    """CLIP's approximation of the GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class _SwiGlu(nn.Module):
    """The gate of DINOv2's ViT-g."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


def dinov2_transformer(state: State) -> VisionTransformer:
    """DINOv2 with or without registers, from the state dict of its backbone.

    Raises:
        KeyError: the weights are of another network.
    """
    kernel = state["patch_embed.proj.weight"]
    registers = state.get("register_tokens")
    side = _SIZE // kernel.shape[-1]

    def mlp(prefix: str) -> Callable[[State], nn.Module]:
        def make(own: State) -> nn.Module:
            names = ("fc1", "fc2") if f"{prefix}fc1.weight" in own else ("w12", "w3")
            first, last = (_linear(own[f"{prefix}{n}.weight"], own[f"{prefix}{n}.bias"]) for n in names)
            return nn.Sequential(first, nn.GELU() if names[0] == "fc1" else _SwiGlu(), last)

        return make

    blocks = []
    for i in range(_depth(state, r"blocks\.(\d+)\.")):
        p = f"blocks.{i}."
        names = {"norm1": f"{p}norm1.", "norm2": f"{p}norm2.", "qkv": f"{p}attn.qkv.", "out": f"{p}attn.proj."}
        names |= {"scale1": f"{p}ls1.gamma", "scale2": f"{p}ls2.gamma"}
        blocks.append(_Block(state, names, 1e-6, mlp(f"{p}mlp.")))
    tokens = state["cls_token"][0] if registers is None else torch.cat([state["cls_token"][0], registers[0]])
    return VisionTransformer(
        (kernel, state["patch_embed.proj.bias"]),
        tokens,
        _positions(state["pos_embed"][0], side, has_registers=registers is not None),
        blocks,
        nn.Identity(),
        _norm(state, "norm.", 1e-6),
    )


def clip_transformer(state: State) -> VisionTransformer:
    """The image side of CLIP, from the whole model's state dict.

    Raises:
        KeyError: the weights are of another network; CLIP's ResNets are not read.
    """
    v = "visual."
    kernel = state[f"{v}conv1.weight"].float()
    state = {key: value.float() for key, value in state.items() if key.startswith(v)}

    def mlp(prefix: str) -> Callable[[State], nn.Module]:
        def make(own: State) -> nn.Module:
            first, last = (_linear(own[f"{prefix}{n}.weight"], own[f"{prefix}{n}.bias"]) for n in ("c_fc", "c_proj"))
            return nn.Sequential(first, _QuickGelu(), last)

        return make

    blocks = []
    for i in range(_depth(state, r"visual\.transformer\.resblocks\.(\d+)\.")):
        p = f"{v}transformer.resblocks.{i}."
        names = {"norm1": f"{p}ln_1.", "norm2": f"{p}ln_2.", "qkv": f"{p}attn.in_proj_", "out": f"{p}attn.out_proj."}
        blocks.append(_Block(state, names, 1e-5, mlp(f"{p}mlp.")))
    return VisionTransformer(
        (kernel, None),
        state[f"{v}class_embedding"][None],
        state[f"{v}positional_embedding"],
        blocks,
        _norm(state, f"{v}ln_pre.", 1e-5),
        nn.Sequential(_norm(state, f"{v}ln_post.", 1e-5), _linear(state[f"{v}proj"].T, None)),
    )


def _depth(state: State, pattern: str) -> int:
    numbers = [int(match[1]) for key in state if (match := re.match(pattern, key))]
    return max(numbers) + 1 if numbers else 0


def _norm(state: State, prefix: str, eps: float) -> nn.LayerNorm:
    norm = nn.LayerNorm(len(state[f"{prefix}weight"]), eps)
    norm.load_state_dict({key: state[f"{prefix}{key}"] for key in ("weight", "bias")})
    return norm


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return layer


def _positions(trained: Tensor, side: int, *, has_registers: bool) -> Tensor:
    """Position embeddings [1 + side^2, width] from those of training, interpolated as DINOv2's own code does it.

    Without registers it scales by (side + 0.1) / trained side, with them to the size and antialiased; both are part of
    what the published weights were evaluated with.
    """
    first, grid = trained[:1], trained[1:]
    old = round(len(grid) ** 0.5)
    if old == side:
        return trained
    grid = grid.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    if has_registers:
        resized = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
    else:
        scale = (side + 0.1) / old
        resized = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([first, resized.permute(0, 2, 3, 1).reshape(side * side, -1)])


class _TransformerFeatures:
    """What the two extractors share; see :class:`bessemer.evaluation.extractors.Extractor`."""

    name: str
    head = None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    build: Callable[[State], VisionTransformer]

    def __init__(self, weights: Path, device: torch.device) -> None:
        self.weights_sha256 = check_weights(self.name, weights)
        try:
            network = type(self).build(read_state(weights))
        except KeyError as e:
            raise EvaluationError(
                f"extractor {self.name}: {weights} holds no tensor {e}; it is not a vision transformer of {self.name}."
            ) from None
        width, _, patch, _ = network.kernel.shape
        if len(network.positions) != (_SIZE // patch) ** 2 + 1:
            raise EvaluationError(
                f"extractor {self.name}: {weights} is not for images of {_SIZE} pixels; use weights that are."
            )
        self.preprocessing = f"bicubic-antialias-float-{_SIZE},{self.name} mean and std"
        self._device = device
        self._network = network.float().eval().requires_grad_(False).to(device)
        self._mean, self._std = (
            torch.tensor(values, device=device).mul(255)[:, None, None] for values in (self.mean, self.std)
        )
        last = network.after[-1] if isinstance(network.after, nn.Sequential) else None
        self.dimension = last.out_features if isinstance(last, nn.Linear) else int(width)

    def features(self, images: Tensor) -> Tensor:
        return in_passes(self._features, images, self._device, _PASS)

    def _features(self, images: Tensor) -> Tensor:
        x = resize_bicubic(images.to(self._device), _SIZE).expand(-1, 3, -1, -1)
        found: Tensor = self._network((x - self._mean) / self._std)
        return found


class DinoV2(_TransformerFeatures):
    """The extractor `dinov2`."""

    name = "dinov2"
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    build = staticmethod(dinov2_transformer)


class Clip(_TransformerFeatures):
    """The extractor `clip`."""

    name = "clip"
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    build = staticmethod(clip_transformer)
