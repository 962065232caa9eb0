"""Which dims of what an operator takes and gives move together.

What is not in the table, and not elementwise by torch's own tag, may stand only where nothing
moves.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from allfuse.merge.align import computing, placing
from allfuse.merge.align.call import Operator


def _table(*rows: tuple[Operator, str]) -> dict[str, Operator]:
    return {name: operator for operator, names in rows for name in names.split()}


OPERATORS: dict[str, Operator] = _table(
    (computing.elementwise, "copy masked_fill _prelu_kernel _to_copy"),
    (computing.alike, "detach alias lift_fresh lift_fresh_copy fill zero"),
    (computing.alike, "_softmax _log_softmax _safe_softmax"),
    (computing.uniform, "zeros ones full empty empty_strided scalar_tensor"),
    (computing.uniform, "zeros_like ones_like full_like empty_like"),
    (computing.uniform, "new_zeros new_ones new_full new_empty new_empty_strided"),
    (computing.filled, "arange linspace eye rand randn randint rand_like randn_like tril_indices"),
    (computing.product, "mm bmm mv dot vdot"),
    (computing.product_and_sum, "addmm baddbmm addmv"),
    (computing.convolution, "convolution"),
    (computing.batch_norm, "native_batch_norm _native_batch_norm_legit cudnn_batch_norm"),
    (computing.batch_norm, "_native_batch_norm_legit_no_training _batch_norm_no_update"),
    (computing.batch_norm, "_batch_norm_with_update batch_norm_with_update"),
    (computing.layer_norm, "native_layer_norm _fused_rms_norm"),
    (computing.group_norm, "native_group_norm"),
    (computing.weight_norm, "_weight_norm_interface"),
    (placing.reduce, "sum nansum mean prod amax amin any all var std var_mean std_mean logsumexp"),
    (placing.reduce, "linalg_vector_norm norm count_nonzero"),
    (placing.find_place, "argmax argmin max min median mode"),
    (placing.in_order, "cumsum cumprod cummax cummin logcumsumexp flip roll sort topk argsort"),
    (placing.view, "view _unsafe_view _reshape_alias reshape"),
    (placing.transpose, "t transpose permute"),
    (placing.squeeze, "squeeze"),
    (placing.unsqueeze, "unsqueeze"),
    (placing.expand, "expand"),
    (placing.repeat, "repeat"),
    (placing.join_ends, "cat"),
    (placing.stack, "stack"),
    (placing.take_parts, "split split_with_sizes unsafe_split unsafe_split_with_sizes"),
    (placing.take_slice, "slice"),
    (placing.take_places, "select unbind"),
    (placing.pad, "constant_pad_nd"),
    (placing.shuffle_pixels, "pixel_shuffle"),
    (placing.shuffle_channels, "native_channel_shuffle channel_shuffle"),
    (placing.halve, "glu"),
    (placing.embedding, "embedding"),
    (placing.choose, "index_select"),
    (placing.index, "index"),
    (placing.gather, "gather"),
    (placing.frozen, "index_put scatter scatter_add scatter_reduce index_add index_copy tril triu"),
    (placing.frozen, "nonzero masked_select diagonal as_strided unfold normal uniform"),
)
"""By the operator's name without what marks it as working in place."""

POOLS = re.compile(
    r"_?(adaptive_)?(avg|max)_pool[123]d(_with_indices)?|_?upsample_\w+?[123]d(_aa)?"
    r"|(reflection|replication)_pad[123]d"
)


def find_operator(function: Any) -> Operator | None:
    """How the dims of an operator's call hang together; None: nobody knows."""
    name = name_of(function)
    if name in OPERATORS:
        return OPERATORS[name]
    if POOLS.fullmatch(name):
        return placing.pool
    return computing.elementwise if torch.Tag.pointwise in function.tags else None


def name_of(function: Any) -> str:
    """An operator's name, the same where it works in place."""
    name = str(function.overloadpacket.__name__)
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def makes_uniform(function: Any) -> bool:
    """Whether an operator makes a tensor that has one number everywhere."""
    return find_operator(function) is computing.uniform
