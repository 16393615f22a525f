"""Where results come from: the model and its weights, the task, the libraries."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

__all__ = ["weights_identity"]


def weights_identity(model: Any) -> dict[str, str]:
    """What tells a model's weights from others: their `dtype`, and a hash of all (`weights`).

    Weights are hashed as they lie in memory, name by name; those on a disk are fetched.
    """
    from accelerate.utils import align_module_device  # not at the top: it takes a second

    digest, dtypes = hashlib.sha256(), set()
    for module in getattr(model, "original_model", model).modules():
        with torch.no_grad(), align_module_device(module):
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for name, tensor in own:
                if tensor.is_floating_point():
                    dtypes.add(str(tensor.dtype).removeprefix("torch."))
                digest.update(f"{name} {list(tensor.shape)}".encode())
                flat = tensor.detach().cpu().contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy().data)
    return {"dtype": "+".join(sorted(dtypes)), "weights": digest.hexdigest()[:16]}
