"""Lets `import torchvision` work beside a CPU-only torch, so that `import streaming` and `import transformers` do.

mosaicml-streaming imports torchvision unconditionally; the published torchvision wheel is linked against CUDA, so with a
CPU build of torch its operators are missing and registering their meta kernels raises `operator torchvision::nms does not
exist`. This module is installed as a `.pth` start-up hook: it waits for the first import of torchvision, declares those two
operators (schemas only) when torch has neither CUDA nor ROCm, and removes itself. With a GPU build it changes nothing.
"""

import importlib.abc
import sys

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _DeclareOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None and torch.version.hip is None:
                for operator in ("nms", "qnms"):
                    torch.library.define(f"torchvision::{operator}", _SCHEMA)
        return None  # never finds anything itself: the ordinary import goes on


sys.meta_path.insert(0, _DeclareOperators())
