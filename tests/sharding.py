"""FSDP on gloo: what accelerate does on GPUs only, so that sharded runs can be tested on a CPU.

In: how many processes. Out: from then on `natcupy.train` shards every model over them, block by
block, with torch's `fully_shard`, as accelerate's plugin does on GPUs.
"""

from natcupy.train import engine
from natcupy.zoo.layers import Block


def on_gloo(processes):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    make = engine.make_accelerator

    def made(config):
        accelerator = make(config)
        prepare = accelerator.prepare

        def sharded(model, optimizer):
            mesh = init_device_mesh("cpu", (processes,))
            names = {id(p): name for name, p in model.named_parameters()}
            grouped = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
            for module in model.modules():
                if isinstance(module, Block):
                    fully_shard(module, mesh=mesh)
            fully_shard(model, mesh=mesh)
            pieces = dict(model.named_parameters())
            for group, owned in zip(optimizer.param_groups, grouped, strict=True):
                group["params"] = [pieces[name] for name in owned]
            return model, prepare(optimizer)

        accelerator.prepare = sharded
        return accelerator

    engine.make_accelerator = made
