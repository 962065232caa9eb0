"""Tensors that lie in mapped files: which of their bytes are in memory."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

MADV_PAGEOUT = 21  # Linux's mman.h, from 5.4 on; elsewhere it is refused, and nothing happens


def let_go(tensor: Tensor) -> None:
    """Have the memory of a tensor in a mapped file given back, now and not when memory is scarce.
    Its numbers stay what they are: they are read again when they are looked at."""
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # neighbours keep their pages
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if advise is not None and end > begin and tensor.is_contiguous():
        advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_PAGEOUT)
