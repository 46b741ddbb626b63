"""One step of an adapted model sharded by FSDP2 over gloo; run by torchrun, writes the whole gradients.

torchrun --nproc-per-node 2 sharded_step.py OUT DTYPE CHECKPOINTING
"""

import sys
from typing import Any

import torch
from models_for_sharding import adapted_model, batch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def main(out: str, dtype: str, checkpointing: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    model: Any = adapted_model(getattr(torch, dtype), checkpointing == "True")
    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    parameters = dict(model.named_parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters.values())
    ids = batch()
    mine = ids[rank::2]
    model(input_ids=mine, labels=mine).loss.backward()
    gradients = {name: one.grad.full_tensor() for name, one in parameters.items() if one.requires_grad}
    if rank == 0:
        torch.save(gradients, out)
    torch.distributed.destroy_process_group()


main(*sys.argv[1:])
