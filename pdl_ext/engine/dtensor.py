"""DTensors that are sharded along the vocabulary: this rank's shard, and the process group of the others."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from pdl_ext._checks import is_dtensor

__all__ = ["GATHERED_BY_FSDP", "replicated", "vocabulary_part"]

GATHERED_BY_FSDP = (
    "With FSDP2 call the loss in the model's forward, where the classifier is gathered. If the classifier is a "
    "fully_shard unit of its own, pass lm_head.weight after lm_head.unshard(), or "
    'full_tensor(grad_placements=[Partial("avg")]): the gradient of a plain full_tensor() is wrong'
)


def vocabulary_part(
    name: str, tensor: Any, dim: int, process_group: dist.ProcessGroup | None
) -> tuple[Tensor, dist.ProcessGroup]:
    """This rank's shard of a DTensor whose vocabulary is its dimension `dim`, and the group of its mesh.

    Gradients have the DTensor's own layout. Raises TypeError for another layout, ValueError if a process_group is also
    given.
    """
    from torch.distributed.tensor import Shard

    mesh, placements = tensor.device_mesh, tuple(tensor.placements)
    # A subclass of Shard has another order of rows.
    if mesh.ndim != 1 or type(placements[0]) is not Shard or placements[0].dim != dim:
        way = f"redistribute(placements=[Shard({dim})]) makes it one" if name == "logits" else GATHERED_BY_FSDP
        raise TypeError(
            f"{name}: got a DTensor with placements {list(placements)}, expected a plain tensor, or a DTensor that a "
            f"one-dimensional mesh shards over the vocabulary, [Shard({dim})]. {way}"
        )
    if process_group is not None:
        raise ValueError(
            f"process_group: got one with a DTensor as {name}, expected None: the group is that of its mesh"
        )
    vocab_size, ranks = tensor.shape[dim], mesh.size()
    if -(-vocab_size // ranks) * (ranks - 1) >= vocab_size:
        raise ValueError(f"{name}: got a vocabulary of {vocab_size} over {ranks} ranks, expected a part on each")
    group = mesh.get_group()
    if mesh.get_coordinate()[0] != dist.get_rank(group):
        raise ValueError(f"{name}: got a DTensor on {mesh}, expected a mesh of ascending ranks")
    return tensor.to_local(), group


def replicated(name: str, tensor: Any, of: Any) -> Tensor:
    """The full tensor of a DTensor on the mesh of `of`, or the plain tensor itself; gradients have its own layout."""
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    if tensor.device_mesh != of.device_mesh:
        raise ValueError(f"{name}: got a DTensor on {tensor.device_mesh}, expected one on {of.device_mesh}")
    whole: Tensor = tensor.redistribute(placements=[Replicate()]).to_local()
    return whole
