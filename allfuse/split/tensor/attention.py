"""`nn.MultiheadAttention` in calls that can be followed one by one, and so be cut by heads.

torch computes it in one call that takes all its weights, where no rank could have some heads only.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from allfuse.base.errors import PlanError


def unfold_attention(model: nn.Module) -> list[str]:
    """Have every `nn.MultiheadAttention` of a model compute in calls of its own; their names.

    Numbers stay what they are, to rounding. Layers of transformers give up the fast path of
    inference, which takes the weights from their modules.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            if module.bias_k is not None or module.add_zero_attn:
                raise PlanError(
                    "tensor",
                    f"{name} is an nn.MultiheadAttention with add_bias_kv or add_zero_attn, which "
                    "is not cut",
                    "data(n)",
                )
            module.forward = types.MethodType(attend, module)  # type: ignore[method-assign]
            found.append(name)
        elif isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # no fast path
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return found


def project(x: Tensor, weight: Tensor, bias: Tensor | None, part: int, parts: int) -> Tensor:
    """A linear map by one of several weights that lie below each other in a tensor."""
    if has_torch_function((x, weight)):
        result: Tensor = handle_torch_function(project, (x, weight), x, weight, bias, part, parts)
        return result
    own = None if bias is None else bias.chunk(parts)[part]
    return F.linear(x, weight.chunk(parts)[part], own)


def attend(
    self: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`nn.MultiheadAttention.forward`. B batch, L and S lengths, E width, H heads, D = E / H."""
    same = query is key and key is value
    if self.batch_first and query.dim() == 3:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    if query.dim() == 2:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        batched = False
    else:
        batched = True
    q, k, v = _project_all(self, query, key, value, same)  # L B E
    lengths, batch = q.shape[0], q.shape[1]
    q, k, v = (x.reshape(x.shape[0], batch, -1, self.head_dim) for x in (q, k, v))
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))  # B H L D
    mask = _mask(attn_mask, key_padding_mask, q, batch)
    dropout = self.dropout if self.training else 0.0
    weights = None
    if need_weights:
        scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
        scores = scores if mask is None else scores + mask
        weights = F.dropout(scores.softmax(-1), dropout, self.training)
        mixed = weights @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    mixed = mixed.permute(2, 0, 1, 3).reshape(lengths, batch, -1)  # L B E
    result = self.out_proj(mixed)
    if not batched:
        result = result.squeeze(1)
    elif self.batch_first:
        result = result.transpose(0, 1)
    return result, weights


def _project_all(
    self: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, same: bool
) -> Any:
    bias = self.in_proj_bias
    if not self._qkv_same_embed_dim:
        return (
            F.linear(x, weight, None if bias is None else bias.chunk(3)[part])
            for part, (x, weight) in enumerate(
                (
                    (query, self.q_proj_weight),
                    (key, self.k_proj_weight),
                    (value, self.v_proj_weight),
                )
            )
        )
    if same:
        return F.linear(query, self.in_proj_weight, bias).chunk(3, -1)
    return (
        project(x, self.in_proj_weight, bias, part, 3) for part, x in enumerate((query, key, value))
    )


def _mask(attn: Tensor | None, padding: Tensor | None, q: Tensor, batch: int) -> Tensor | None:
    """Both masks as what is added to scores, of a shape that spreads to B H L S."""
    parts = []
    for mask in (attn, padding):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, float("-inf"))
        parts.append(mask.to(q.dtype))
    if padding is not None:
        parts[-1] = parts[-1].view(batch, 1, 1, -1)
    if attn is not None and parts[0].dim() == 3:  # a mask for each head
        parts[0] = parts[0].view(batch, -1, *parts[0].shape[1:])
    return None if not parts else sum(parts[1:], parts[0])
