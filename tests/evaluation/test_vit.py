"""The transformers against torch's own attention layers, from files as their authors publish them."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from bessemer.errors import EvaluationError
from bessemer.evaluation.extractors import get_extractor
from bessemer.evaluation.resize import resize_bicubic
from bessemer.evaluation.vit import dinov2_transformer

WIDTH, DEPTH, EMBEDDING = 128, 2, 24


class Block(nn.Module):
    """CLIP's block, with the names of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, WIDTH // 64, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        h = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](h * torch.sigmoid(1.702 * h))


class Visual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(50, WIDTH))
        self.proj = nn.Parameter(torch.randn(WIDTH, EMBEDDING))
        self.conv1 = nn.Conv2d(3, WIDTH, 32, 32, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*(Block() for _ in range(DEPTH)))})

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer["resblocks"](self.ln_pre(x))[:, 0]) @ self.proj


class ClipModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Visual()
        self.logit_scale = nn.Parameter(torch.ones(()))  # the rest of the model is there, and left alone

    def forward(self, x: Tensor) -> Tensor:
        return self.visual(x)


def random_weights(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return module.eval()


def normalised(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    x = resize_bicubic(images, 224) / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (3, 3, 20, 20), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.parametrize("form", ["torchscript", "state dict", "safetensors"])
def test_clip_equals_torchs_attention(
    form: str, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_weights(ClipModel(), 1)
    path = tmp_path / ("ViT-B-32.safetensors" if form == "safetensors" else "ViT-B-32.pt")
    x = normalised(images, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    with torch.no_grad():
        expected = model(x)
        if form == "torchscript":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.jit.trace(model, x).save(str(path))
        elif form == "state dict":
            torch.save(model.state_dict(), path)
        else:
            save_file(model.state_dict(), path)
    monkeypatch.setenv("BESSEMER_CLIP", str(path))
    extractor = get_extractor("clip")
    assert (extractor.name, extractor.dimension) == ("clip", EMBEDDING)
    torch.testing.assert_close(extractor.features(images), expected, rtol=1e-3, atol=1e-3)
    assert expected.std() > 0.1


def dinov2_state(registers: int = 0, side: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 1 + side * side, WIDTH),
        "mask_token": (1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 14, 14),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    if registers:
        shapes["register_tokens"] = (1, registers, WIDTH)
    for i in range(DEPTH):
        for name, shape in {
            "norm1": (WIDTH,),
            "norm2": (WIDTH,),
            "attn.qkv": (3 * WIDTH, WIDTH),
            "attn.proj": (WIDTH, WIDTH),
            "mlp.fc1": (4 * WIDTH, WIDTH),
            "mlp.fc2": (WIDTH, 4 * WIDTH),
        }.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        shapes |= {f"blocks.{i}.ls1.gamma": (WIDTH,), f"blocks.{i}.ls2.gamma": (WIDTH,)}
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def dinov2_by_torch(state: dict[str, Tensor], x: Tensor, positions: Tensor) -> Tensor:
    """The backbone's definition, with torch.nn.MultiheadAttention for the attention."""
    x = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], dim=1) + positions
    if "register_tokens" in state:
        x = torch.cat([x[:, :1], state["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], dim=1)
    for i in range(DEPTH):
        part = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}
        attention = nn.MultiheadAttention(WIDTH, WIDTH // 64, batch_first=True).eval()
        attention.load_state_dict(
            {
                "in_proj_weight": part["attn.qkv.weight"],
                "in_proj_bias": part["attn.qkv.bias"],
                "out_proj.weight": part["attn.proj.weight"],
                "out_proj.bias": part["attn.proj.bias"],
            }
        )
        y = F.layer_norm(x, (WIDTH,), part["norm1.weight"], part["norm1.bias"], 1e-6)
        x = x + part["ls1.gamma"] * attention(y, y, y, need_weights=False)[0]
        y = F.layer_norm(x, (WIDTH,), part["norm2.weight"], part["norm2.bias"], 1e-6)
        y = F.linear(F.gelu(F.linear(y, part["mlp.fc1.weight"], part["mlp.fc1.bias"])), part["mlp.fc2.weight"])
        x = x + part["ls2.gamma"] * (y + part["mlp.fc2.bias"])
    return F.layer_norm(x, (WIDTH,), state["norm.weight"], state["norm.bias"], 1e-6)[:, 0]


@torch.no_grad()
def test_dinov2_equals_torchs_attention(images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = dinov2_state()
    torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
    monkeypatch.setenv("BESSEMER_DINOV2", str(tmp_path))
    extractor = get_extractor("dinov2")
    x = normalised(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    expected = dinov2_by_torch(state, x, state["pos_embed"])
    assert extractor.dimension == WIDTH
    torch.testing.assert_close(extractor.features(images), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2s_positions_are_interpolated_as_its_authors_do(registers: int) -> None:
    state = dinov2_state(registers, side=37)  # trained at 518 pixels
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    grid = state["pos_embed"][:, 1:].reshape(1, 37, 37, WIDTH).permute(0, 3, 1, 2)
    if registers:
        grid = F.interpolate(grid, (16, 16), mode="bicubic", antialias=True)
    else:
        grid = F.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic")
    positions = torch.cat([state["pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    network = dinov2_transformer(state).eval()
    torch.testing.assert_close(network.positions, positions[0])
    found = network(x)
    torch.testing.assert_close(found, dinov2_by_torch(state, x, positions), rtol=1e-3, atol=1e-3)


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pth"
    monkeypatch.setenv("BESSEMER_DINOV2", str(path))
    path.write_bytes(b"no weights")
    with pytest.raises(EvaluationError, match="no weights can be read"):
        get_extractor("dinov2")
    torch.save({"something.weight": torch.zeros(2)}, path)
    with pytest.raises(EvaluationError, match=r"holds no tensor 'patch_embed\.proj\.weight'"):
        get_extractor("dinov2")
    torch.save(nn.Linear(2, 2), path)  # a pickle with code
    with pytest.raises(EvaluationError, match="no weights can be read"):
        get_extractor("dinov2")
