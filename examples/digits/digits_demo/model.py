"""A small pre-norm vision transformer for 8x8 digits, built from plain linear layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

# Mean and standard deviation of the upright training pixels, rounded.
_PIXEL_MEAN = 0.3
_PIXEL_STD = 0.38


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of the transformer; the defaults give 0.14 million parameters."""

    image_size: int = 8
    patch_size: int = 2
    dim: int = 64
    depth: int = 4
    heads: int = 4
    mlp_ratio: int = 2
    labels: int = 10

    @property
    def patches(self) -> int:
        """Number of tokens: the patches of one image."""
        return (self.image_size // self.patch_size) ** 2

    def to_dict(self) -> dict[str, int]:
        """Return the sizes as a JSON-ready dict."""
        return asdict(self)


class Attention(nn.Module):
    """Multi-head self-attention on ``[n, tokens, dim]``."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, tokens, dim]`` to the same shape."""
        n, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(n, tokens, dim))
        return out


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, tokens, dim]`` to the same shape."""
        out: Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim)
        self.attn = Attention(config.dim, config.heads)
        self.norm2 = nn.LayerNorm(config.dim)
        self.mlp = Mlp(config.dim, config.mlp_ratio * config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, tokens, dim]`` to the same shape."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class DigitViT(nn.Module):
    """Images ``[n, 8, 8]`` float32 in, logits ``[n, 10]`` out; tokens are mean-pooled."""

    def __init__(self, config: ViTConfig | None = None) -> None:
        super().__init__()
        self.sizes = config or ViTConfig()
        sizes = self.sizes
        self.patch_embed = nn.Linear(sizes.patch_size**2, sizes.dim)
        # Unit scale: with few steps, positions learnt from near zero never catch up.
        self.pos_embed = nn.Parameter(torch.randn(sizes.patches, sizes.dim))
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(sizes.dim)
        self.head = nn.Linear(sizes.dim, sizes.labels)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the ten digits."""
        patches = self.patchify((images - _PIXEL_MEAN) / _PIXEL_STD)
        x = self.patch_embed(patches) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(dim=1))
        return logits

    def patchify(self, images: Tensor) -> Tensor:
        """Cut ``[n, size, size]`` into row-major patches ``[n, patches, patch_size**2]``."""
        p, grid = self.sizes.patch_size, self.sizes.image_size // self.sizes.patch_size
        cells = images.view(len(images), grid, p, grid, p).transpose(2, 3)
        return cells.reshape(len(images), grid * grid, p * p)
