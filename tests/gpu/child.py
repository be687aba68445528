"""Processes of their own, for what may end one: `python child.py ACTION RIG`, a line of JSON out.

`lost`: a bad kernel, then a good call; `fork`: a call in a child forked after CUDA was used;
`rank N PORT`: one of two ranks that train one model on one GPU.
"""

import json
import os
import struct
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent), str(FOLDER.parent.parent)]


def lost(rig):
    """Whether the fault is named at its own launch, and what later calls say."""
    from kernel_cases import F32, inputs
    from problems import feature, run

    from natcupy.cuda import jit
    from natcupy.cuda.launch import Launch
    from natcupy.cuda.source import Spec

    case = feature("plain", 1, F32, "small")
    tensors = inputs(case, rig.device)
    run(case, tensors)
    bad = Launch(Spec("bad_store.cu"), (1, 1, 1), (32, 1, 1), 0, struct.pack("<Q", 256))
    said = []
    for attempt in range(2):
        try:
            if attempt == 0:
                with jit.use_sources(FOLDER):
                    jit.launch(bad, rig.device)
            else:
                run(case, tensors)
            said.append("nothing")
        except RuntimeError as error:
            said.append(str(error))
    return {"said": said}


def fork(rig):
    """What a call in a forked child says, and whether the parent goes on."""
    import torch
    from kernel_cases import F32, inputs
    from problems import feature, run

    case = feature("plain", 1, F32, "small")
    tensors = {n: None if x is None else x.detach() for n, x in inputs(case, rig.device).items()}
    before = run(case, tensors)[0]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            run(case, tensors)
            text = "nothing"
        except RuntimeError as error:
            text = str(error)
        os.write(writing, text.encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return {"said": said, "parent": torch.equal(run(case, tensors)[0], before)}


def rank(rig, number, port):
    """Losses of two ranks with half a batch each, beside one process with all of it."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    import natcupy

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=int(number), world_size=2)

    def layer():
        torch.manual_seed(0)
        made = natcupy.NeighborhoodAttention2D(32, 2, 3, rel_pos_bias=True)
        return made.to(rig.device)

    side, steps = rig.size(14, 3), rig.size(20, 2)
    make = torch.Generator().manual_seed(1)
    batches = torch.randn(steps, 4, side, side, 32, generator=make).to(rig.device)
    part = slice(2 * int(number), 2 * int(number) + 2)
    results = []
    for together in (True, False):
        model = layer()
        trained = DistributedDataParallel(model) if together else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x in batches:
            optimizer.zero_grad()
            trained(x[part] if together else x).square().mean().backward()
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    dist.destroy_process_group()
    return {"difference": (results[0] - results[1]).abs().max().item()}


def main(action, name, *rest):
    from rigs import Rig

    rig = Rig(name, raises=True)
    with rig.active():
        found = {"lost": lost, "fork": fork, "rank": rank}[action](rig, *rest)
        print(json.dumps(found), flush=True)
    # The answer is given: a thread of autograd that lets go of a graph late, or a lost context,
    # may end the interpreter's own way out with a signal.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
