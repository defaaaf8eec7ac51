"""Pre-norm Transformer towers: x = x + attention(norm(x)); x = x + mlp(norm(x)).

The weights of the blocks have the names of OpenAI's CLIP and of open_clip (`attn.in_proj_weight`, `mlp.c_fc`,
...), so that their state_dicts load without renaming.

Source: Radford et al., "CLIP", 2103.00020, section 2.4; GPT-2 for the initialisation.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): the approximation of GELU with which OpenAI's CLIP was trained.

    Example:
        >>> QuickGELU()(torch.zeros(2))
        tensor([0., 0.])
    """

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head self-attention. One projection makes q, k and v (the rows of in_proj_weight in this order).

    Args:
        dim: width of the tokens.
        heads: the number of heads.
        dim_head: width of a head.

    Example:
        >>> attention = Transformer(dim=8, depth=1, heads=2).resblocks[0].attn
        >>> attended, (keys, values) = attention(torch.randn(1, 3, 8), causal=True)
        >>> attended.shape, keys.shape
        (torch.Size([1, 3, 8]), torch.Size([1, 2, 3, 4]))
    """

    def __init__(self, dim: int, heads: int, dim_head: int):
        super().__init__()
        self.heads, self.dim_head = heads, dim_head
        inner = heads * dim_head
        self.in_proj_weight = nn.Parameter(torch.empty(3 * inner, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * inner))
        self.out_proj = nn.Linear(inner, dim)

    def forward(
        self,
        x: Tensor,  # [B, L, dim]
        causal: bool = False,
        past: tuple[Tensor, Tensor] | None = None,  # keys, values of earlier positions, each [B, H, P, D]
        mask: Tensor | None = None,  # bool, broadcasts to [B, H, L, P + L]; True = attend
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attended tokens [B, L, dim], and the keys and values of all P + L positions for a later `past`."""
        batch, length, _ = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(batch, length, 3, self.heads, self.dim_head).permute(2, 0, 3, 1, 4).unbind(0)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out_proj(out.transpose(1, 2).flatten(2)), (k, v)


class Block(nn.Module):
    """One pre-norm residual block: attention, then an MLP of two layers.

    Args:
        dim: width of the tokens.
        heads: the number of attention heads.
        dim_head: width of a head.
        mlp_ratio: width of the hidden layer of the MLP, as a multiple of dim.
        quick_gelu: whether the activation is QuickGELU instead of GELU.

    Example:
        >>> block = Transformer(dim=8, depth=1, heads=2).resblocks[0]
        >>> block(torch.randn(1, 3, 8))[0].shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, dim: int, heads: int, dim_head: int, mlp_ratio: float = 4.0, quick_gelu: bool = False):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.ln_1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, dim_head)
        self.ln_2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(dim, hidden),
            gelu=QuickGELU() if quick_gelu else nn.GELU(),
            c_proj=nn.Linear(hidden, dim),
        ))

    def forward(
        self,
        x: Tensor,
        causal: bool = False,
        past: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Tokens [B, L, dim], and keys and values for a later `past`; arguments as in `Attention.forward`."""
        attended, keys_values = self.attn(self.ln_1(x), causal, past, mask)
        x = x + attended
        return x + self.mlp(self.ln_2(x)), keys_values


class Transformer(nn.Module):
    """A stack of blocks: [B, L, dim] -> [B, L, dim].

    A causal position never sees later ones. `prefill` therefore computes the keys and values of a prefix
    once, and `extend` uses them for every continuation: the text of the prior is the same in all sampling
    steps.

    Args:
        dim: width of the tokens.
        depth: the number of blocks.
        heads: the number of attention heads.
        dim_head: width of a head; None is dim / heads.
        mlp_ratio: width of the hidden layer of the MLPs, as a multiple of dim.
        quick_gelu: whether the activation is QuickGELU instead of GELU.

    Raises:
        ValueError: depth or heads is less than 1, or heads does not divide dim.

    Example:
        >>> transformer = Transformer(dim=8, depth=2, heads=2)
        >>> transformer(torch.randn(1, 3, 8), causal=True).shape
        torch.Size([1, 3, 8])
        >>> cache = transformer.prefill(torch.randn(1, 3, 8))
        >>> transformer.extend(torch.randn(1, 1, 8), cache, torch.ones(1, 1, 1, 4, dtype=torch.bool)).shape
        torch.Size([1, 1, 8])
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        dim_head: int | None = None,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = False,
    ):
        super().__init__()
        if depth < 1 or heads < 1:
            raise ValueError(f"depth and heads: expected at least 1, got depth={depth}, heads={heads}")
        if dim_head is None:
            if dim % heads:
                raise ValueError(f"dim: expected a multiple of heads = {heads}, got {dim}")
            dim_head = dim // heads
        blocks = (Block(dim, heads, dim_head, mlp_ratio, quick_gelu) for _ in range(depth))
        self.resblocks = nn.ModuleList(blocks)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as CLIP does: the outputs of the branches shrink with depth, so that the residual stream
        keeps its scale."""
        depth = len(self.resblocks)
        for block in self.resblocks:
            dim = block.ln_1.normalized_shape[0]
            nn.init.normal_(block.attn.in_proj_weight, std=dim**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=dim**-0.5 * (2 * depth) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * dim) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=dim**-0.5 * (2 * depth) ** -0.5)
            nn.init.zeros_(block.attn.in_proj_bias)
            for linear in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """Tokens [B, L, dim] -> tokens [B, L, dim]; with causal=True no position sees a later one."""
        for block in self.resblocks:
            x, _ = block(x, causal)
        return x

    def prefill(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The keys and values of every block, from a causal pass over the prefix x [B, P, dim]."""
        cache = []
        for block in self.resblocks:
            x, keys_values = block(x, causal=True)
            cache.append(keys_values)
        return cache

    def extend(self, x: Tensor, cache: list[tuple[Tensor, Tensor]], mask: Tensor) -> Tensor:
        """Continue after P cached positions: x [B, L, dim], mask bool [B, 1, L, P + L], True = attend."""
        for block, past in zip(self.resblocks, cache, strict=True):
            x, _ = block(x, past=past, mask=mask)
        return x


def token_lengths(tokens: Tensor, eos_token_id: int | None = None) -> Tensor:
    """The length of each caption: 1 + the position of its last non-zero token.

    The end counts, so that a token 0 inside a caption stays (it is a real "!" in OpenAI's vocabulary).

    Args:
        tokens: token ids int64 [B, L], padded with 0.
        eos_token_id: the first token with this id ends a caption, because rows may be padded with it, as
            Hugging Face's tokenizer pads them. None: only zeros are padding.

    Returns:
        int64 [B].

    Example:
        >>> token_lengths(torch.tensor([[5, 0, 7, 0], [5, 9, 9, 9]]), eos_token_id=9)
        tensor([3, 2])
    """
    positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
    lengths = torch.where(tokens != 0, positions, 0).amax(dim=1)
    if eos_token_id is None:
        return lengths
    return torch.where(tokens == eos_token_id, positions, lengths[:, None]).amin(dim=1)


class TextTransformer(nn.Module):
    """A text encoder: tokens int64 [B, L] (0 = padding at the end) -> encodings [B, L, dim].

    No token attends to padding, and the encodings of padded positions are zero. A causal tower needs no mask
    for this, because padding comes last; a bidirectional tower masks the keys.

    Args:
        num_tokens: size of the vocabulary.
        context_length: the largest L.
        dim: width of the tokens.
        depth: the number of blocks.
        heads: the number of attention heads.
        causal: whether no token sees a later one.
        mlp_ratio: width of the hidden layer of the MLPs, as a multiple of dim.
        quick_gelu: whether the activation is QuickGELU, as in OpenAI's weights.
        eos_token_id: the token that ends a caption (see `token_lengths`); None: a caption ends at its last
            non-zero token.

    Raises:
        ValueError: eos_token_id is not an id of the vocabulary other than 0, or a size is impossible.

    Example:
        >>> encoder = TextTransformer(num_tokens=10, context_length=6, dim=8, depth=1, heads=2)
        >>> encodings, mask = encoder.encode_tokens(torch.tensor([[3, 4, 0, 0]]))
        >>> encodings.shape, mask
        (torch.Size([1, 4, 8]), tensor([[ True,  True, False, False]]))
    """

    def __init__(
        self,
        num_tokens: int,
        context_length: int,
        dim: int,
        depth: int,
        heads: int,
        causal: bool = True,
        *,
        mlp_ratio: float = 4.0,
        quick_gelu: bool = False,
        eos_token_id: int | None = None,
    ):
        super().__init__()
        if eos_token_id is not None and not 0 < eos_token_id < num_tokens:
            raise ValueError(f"eos_token_id: expected an id from 1 to {num_tokens - 1}, got {eos_token_id}")
        self.config = dict(
            num_tokens=num_tokens, context_length=context_length, dim=dim, depth=depth, heads=heads,
            causal=causal, mlp_ratio=mlp_ratio, quick_gelu=quick_gelu, eos_token_id=eos_token_id,
        )
        self.num_tokens, self.context_length, self.causal = num_tokens, context_length, causal
        self.eos_token_id = eos_token_id
        self.token_embedding = nn.Embedding(num_tokens, dim)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, dim))
        self.transformer = Transformer(dim, depth, heads, mlp_ratio=mlp_ratio, quick_gelu=quick_gelu)
        self.ln_final = nn.LayerNorm(dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        """The encodings [B, L, dim] of tokens int64 [B, L], L <= context_length; zero where padded."""
        return self.encode_tokens(tokens)[0]

    def encode_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode tokens.

        Args:
            tokens: int64 [B, L], 1 <= L <= context_length, padded with 0.

        Returns:
            Encodings [B, L, dim], zero where padded, and a mask bool [B, L], True up to the last token.

        Raises:
            TypeError, ValueError: tokens have the wrong dtype or shape, or (on a CPU) an id is out of range.
        """
        self._check_tokens(tokens)
        batch, length = tokens.shape
        lengths = token_lengths(tokens, self.eos_token_id)
        mask = torch.arange(length, device=tokens.device) < lengths[:, None]
        # On a CPU only the columns up to the longest caption are computed. On a GPU, reading that length
        # would stall the queue, and shapes that change from batch to batch would defeat compiled graphs.
        used = length
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and batch > 0:
            used = max(int(lengths.max()), 1)
        x = self.token_embedding(tokens[:, :used])
        x = x + self.positional_embedding[:used].to(x.dtype)
        if self.causal:
            x = self.transformer(x, causal=True)
        else:
            # A padded position attends to itself, so that no softmax is empty.
            keys = mask[:, None, None, :used] | torch.eye(used, dtype=torch.bool, device=tokens.device)
            for block in self.transformer.resblocks:
                x, _ = block(x, mask=keys)
        x = self.ln_final(x)
        x = x.masked_fill(~mask[:, :used, None], 0.0)
        return F.pad(x, (0, 0, 0, length - used)), mask

    def _check_tokens(self, tokens: Tensor, name: str = "text") -> None:
        if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
            came = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"{name}: expected token ids, an int64 tensor [B, L], got {came}")
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.context_length:
            raise ValueError(
                f"{name}: expected [B, L] with 1 <= L <= {self.context_length}, got {tuple(tokens.shape)}")
        # The values are read on a CPU only, where that is free; a GPU reports them from the embedding kernel.
        if tokens.device.type == "cpu" and tokens.numel() and not torch.compiler.is_compiling():
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.num_tokens:
                expected = f"token ids in [0, {self.num_tokens - 1}]"
                raise ValueError(f"{name}: expected {expected}, got {low} to {high}")
