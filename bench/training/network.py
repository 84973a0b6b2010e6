"""LLaDA's forward pass for training, and the sizes of the bundled model."""

import torch
import torch.nn.functional as F

VOCAB, WIDTH, LAYERS, HEADS, MLP = 384, 192, 5, 4, 512
MAX_LENGTH, BLOCK, THETA, EPS = 512, 32, 10000.0, 1e-5


class Net(torch.nn.Module):
    """LLaDA's forward pass with the weights of all layers stacked by shape."""

    def __init__(self) -> None:
        super().__init__()
        scale = WIDTH**-0.5
        self.embedding = torch.nn.Parameter(torch.randn(VOCAB, WIDTH) * 0.5)
        self.head = torch.nn.Parameter(torch.randn(VOCAB, WIDTH) * 0.02)
        self.norms = torch.nn.Parameter(torch.ones(2 * LAYERS + 1, WIDTH))
        self.qkv = torch.nn.Parameter(torch.randn(LAYERS * 3, WIDTH, WIDTH) * scale)
        self.out = torch.nn.Parameter(torch.zeros(LAYERS, WIDTH, WIDTH))
        self.gate_up = torch.nn.Parameter(torch.randn(LAYERS * 2, MLP, WIDTH) * scale)
        self.down = torch.nn.Parameter(torch.zeros(LAYERS, WIDTH, MLP))
        frequencies = THETA ** -(torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS))
        angles = torch.outer(torch.arange(MAX_LENGTH), frequencies)
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        self.register_buffer("sin", angles.sin().repeat(1, 2), persistent=False)

    def forward(
        self, ids: torch.Tensor, places: torch.Tensor, seen: torch.Tensor | None, wanted: torch.Tensor
    ) -> torch.Tensor:
        """Logits [wanted, vocab] of the entries `wanted` of ids [rows, length], counted row by row."""
        rows, length = ids.shape
        x = F.embedding(ids, self.embedding)
        cos, sin = self.cos[places][:, None], self.sin[places][:, None]
        for i in range(LAYERS):
            h = F.rms_norm(x, (WIDTH,), self.norms[2 * i], EPS)
            q, k, v = F.linear(h, self.qkv[3 * i : 3 * i + 3].flatten(0, 1)).view(rows, length, 3, HEADS, -1).unbind(2)
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            mixed = F.scaled_dot_product_attention(turned(q, cos, sin), turned(k, cos, sin), v, attn_mask=seen)
            x = x + F.linear(mixed.transpose(1, 2).flatten(2), self.out[i])
            h = F.rms_norm(x, (WIDTH,), self.norms[2 * i + 1], EPS)
            gate, up = F.linear(h, self.gate_up[2 * i : 2 * i + 2].flatten(0, 1)).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, self.down[i])
        return F.linear(F.rms_norm(x.flatten(0, 1)[wanted], (WIDTH,), self.norms[-1], EPS), self.head)


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin
