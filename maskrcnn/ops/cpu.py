"""Short cuts of the CPU, where it costs nothing to look at values, and shapes may depend on them.

On other devices the host would wait for the device, and shapes would differ from batch to batch. There, all slots of a
padded tensor are computed, and what padding gives is ignored: losses, gradients and detections are the same. Exported
graphs compute all slots, too.

Shapes: B images, S slots of an image, N slots that are computed, of all images.
"""

from __future__ import annotations

import torch
from torch import Tensor


def takes_short_cuts(tensor: Tensor) -> bool:
    """Return whether operations on this tensor may look at values to save work."""
    return tensor.device.type == "cpu" and not torch.compiler.is_exporting()


def used_slots(used: Tensor, *, drop_padding: bool = False) -> tuple[Tensor, Tensor]:
    """Return the slots to compute, by image and then by slot: on a CPU the used ones, elsewhere all of them.

    Args:
        used: `(B, S)` bool, False for padding.
        drop_padding: return the used ones on every device, for which the host waits.

    Returns:
        Image and slot of each, `(N,)` int64.
    """
    if drop_padding or takes_short_cuts(used):
        images, slots = used.nonzero(as_tuple=True)
        return images, slots
    batch, count = used.shape
    images = torch.arange(batch, device=used.device)[:, None].expand(batch, count)
    slots = torch.arange(count, device=used.device).expand(batch, count)
    return images.flatten(), slots.flatten()


def spread(values: Tensor, used: Tensor) -> Tensor:
    """Return values `(N, ...)` of the `used_slots` in their slots, `(B, S, ...)`, and zeros in slots without use."""
    if takes_short_cuts(used):
        dense = values.new_zeros(*used.shape, *values.shape[1:])
        dense[used] = values
        return dense
    mask = used.view(*used.shape, *[1] * (values.dim() - 1))
    return torch.where(mask, values.view(*used.shape, *values.shape[1:]), 0)
