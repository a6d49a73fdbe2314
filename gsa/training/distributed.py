"""Several processes that train one model: who they are, what they agree on, how a model is shared.

    with join(config.device) as team:       # of torchrun; one process if there is none
        team.shard(model, config)
        team.sum(loss)

Each process holds a share of every parameter and of its moments (FSDP2), and of every batch. Over
several hosts, each holds the whole model, shared among its processes (HSDP). One process without
torchrun has no process group, and every method is then what it would do alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import get_node_local_rank
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from gsa.training.config import TrainConfig
from gsa.training.errors import RunError

Result = TypeVar("Result")
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Team:
    """The processes of a run, seen from one of them.

    mesh: [shard], or [replicate, shard] over several hosts; None in a single process.
    savers: a group of its own for what saves in the background: collectives of two threads must
    not meet in one group.
    """

    rank: int = 0
    world: int = 1
    mesh: DeviceMesh | None = None
    savers: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes what only one may write."""
        return self.rank == 0

    def shard(self, model: Any, config: TrainConfig) -> None:
        """Leaves this process its share of the model, block by block; gradients are summed.

        In bf16 parameters are gathered and used in bf16 and gradients summed in fp32; what is
        stored, and stepped by the optimizer, keeps the dtype that the model has now.
        """
        if self.mesh is None:
            return
        policy = MixedPrecisionPolicy()
        if config.dtype == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=self.mesh, mp_policy=policy)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # The loss is divided by the targets of all processes: a mean would divide twice.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum

    def reshard(self, model: Any) -> None:
        """Leaves this process its share again, after forward passes that no backward pass follows.

        Blocks do so by themselves; embeddings and head are kept for the backward pass.
        """
        if self.mesh is not None:
            model.reshard()

    def reduce_over_hosts(self, model: Any, now: bool) -> None:
        """Whether the next backward pass sums gradients over hosts too, or leaves that to a later.

        Within a host every pass sums: no process has room for a whole gradient.
        """
        if self.mesh is not None and self.mesh.ndim == 2:
            model.set_requires_all_reduce(now)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes, in place, the same bits on all."""
        if self.mesh is not None:
            dist.all_reduce(value)
        return value

    def as_first(self, value: Tensor) -> Tensor:
        """The first process's value, in place."""
        if self.mesh is not None:
            dist.broadcast(value, src=0)
        return value

    def total(self, number: int) -> int:
        """The sum of a number over processes."""
        return int(self.sum(torch.tensor(number)))

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each number among processes: what one wants, all do."""
        values = torch.tensor(numbers)
        if self.mesh is not None:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    def ask_first(self, call: Callable[[], Result]) -> Result:
        """What the call returns in the first process, the only one to make it.

        RunError in the others if it failed there, so that none waits for what does not come.
        """
        if self.mesh is None:
            return call()
        answer: list[Any] = [None, None]
        error = None
        if self.first:
            try:
                answer[0] = call()
            except (ValueError, OSError, RunError) as caught:
                error, answer[1] = caught, str(caught)
        dist.broadcast_object_list(answer, src=0, device=_CPU)
        if error is not None:
            raise error
        if answer[1] is not None:
            raise RunError(answer[1])
        return answer[0]

    def together(self, call: Callable[[], Result]) -> list[Result]:
        """What the call returns in every process, in order; for background saves.

        OSError in all of them if it failed in one.
        """
        value, error = None, None
        try:
            value = call()
        except (OSError, SafetensorError) as caught:
            error = str(caught)
        if self.savers is None:
            answers: list[Any] = [(value, error)]
        else:
            answers = [None] * self.world
            dist.all_gather_object(answers, (value, error), group=self.savers)
        failed = [f"process {i}: {said}" for i, (_, said) in enumerate(answers) if said is not None]
        if failed:
            raise OSError("; ".join(failed))
        return [value for value, _ in answers]


def is_sharded(model: Any) -> bool:
    """Whether a process holds its share of the model only."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process has a part, put together; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def join(device: str) -> Iterator[Team]:
    """The team that torchrun started this process in, or the one whose process group is there.

    After an error the process group is left as it is: others may wait in it, and torchrun ends
    them. ValueError if hosts have different numbers of processes.
    """
    theirs = dist.is_initialized()
    if not theirs and not dist.is_torchelastic_launched():
        yield Team()
        return
    cuda = device.split(":")[0] == "cuda"
    if not theirs:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    world = dist.get_world_size()
    yield _team("cuda" if cuda else "cpu", world) if world > 1 else Team()
    if not theirs:
        dist.destroy_process_group()


def _team(device_type: str, world: int) -> Team:
    rank = dist.get_rank()
    local = get_node_local_rank(rank)
    if device_type == "cuda":
        torch.cuda.set_device(local)
    of_hosts = torch.tensor([int(local == 0), local + 1])
    dist.all_reduce(of_hosts[:1])
    dist.all_reduce(of_hosts[1:], dist.ReduceOp.MAX)
    hosts, most = of_hosts.tolist()
    if hosts * most != world:
        raise ValueError(
            f"torchrun: expected the same number of processes on each host, got {world} on "
            f"{hosts} hosts with up to {most}; give each the same --nproc-per-node"
        )
    shape, names = (hosts, most), ("replicate", "shard")
    if 1 in shape:  # hosts of one process each share the model among them
        shape, names = (world,), ("shard",)
    savers = dist.new_group(backend="gloo")
    assert isinstance(savers, dist.ProcessGroup)
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
    return Team(rank=rank, world=world, mesh=mesh, savers=savers)
