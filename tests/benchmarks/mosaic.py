"""MosaicML's ``streaming``, importable beside a torch without CUDA.

It imports torchvision, whose PyPI wheel lacks its operators there and fails for want of two.
"""

import torch

if not torch.backends.cuda.is_built():
    for operator in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{operator}", schema)

from streaming import MDSWriter, StreamingDataLoader, StreamingDataset
from streaming.base.util import clean_stale_shared_memory

__all__ = ["MDSWriter", "StreamingDataLoader", "StreamingDataset", "clean_stale_shared_memory"]
