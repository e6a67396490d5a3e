"""Heads whose weight is spread over processes: vocabulary-parallel groups of any size, and FSDP2."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import fastrl
from fastrl_kernels import planner

N, D, V = 200, 8, 101


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def in_process(rank: int, world: int, port: int, folder: str, body: Callable[[int, int], None]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        body(rank, world)
        (Path(folder) / f"{rank}.ok").touch()
    except Exception:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def run(world: int, body: Callable[[int, int], None], folder: Path) -> None:
    mp.spawn(in_process, (world, free_port(), str(folder), body), nprocs=world)
    assert len(list(folder.glob("*.ok"))) == world, [p.read_text() for p in folder.glob("*.error")]


def vocabulary_parallel(rank: int, world: int) -> None:
    with planner.forced(tile_bytes=30_000, min_rows=1):  # several chunks; a smaller shard alone would take more rows
        _vocabulary_parallel(rank, world)


def _vocabulary_parallel(rank: int, world: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D, dtype=torch.float64), torch.randn(V, D, dtype=torch.float64)
    bias, ids = torch.randn(V, dtype=torch.float64), torch.randint(V, (N,))
    mask, upstream = torch.rand(N) > 0.2, [torch.randn(N, dtype=torch.float64) for _ in range(3)]
    cuts = [0, *sorted(torch.randperm(V - 1)[: world - 1].add(1).tolist()), V]  # uneven shards
    mine = slice(cuts[rank], cuts[rank + 1])

    def results(h: Tensor, w: Tensor, b: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
        h, w, b = (x.detach().clone().requires_grad_() for x in (h, w, b))
        stats = fastrl.linear_logprobs(h, w, ids, bias=b, mask=mask, entropy=True, temperature=0.7, tp_group=group)
        total = sum((o * g).sum() for o, g in zip(stats, upstream, strict=True) if o is not None)
        grads = torch.autograd.grad(total, [h, w, b])  # type: ignore[arg-type]
        args = {"advantages": torch.ones(5), "mask": mask.view(5, 40), "bias": b, "tp_group": group}
        objective = fastrl.PolicyObjective(entropy_coef=0.1)
        loss = fastrl.linear_policy_loss(h.view(5, 40, D), w, ids.view(5, 40), objective, **args).loss  # type: ignore[arg-type]
        return [*stats, *grads, loss, *torch.autograd.grad(loss, [h, w, b])]  # type: ignore[list-item]

    whole = results(hidden, weight, bias, None)
    shard = results(hidden, weight[mine], bias[mine], dist.group.WORLD)
    sharded = {4, 5, 8, 9}  # dW and db of the two losses are this rank's rows
    for i, (a, b) in enumerate(zip(whole, shard, strict=True)):
        torch.testing.assert_close(
            a[mine] if i in sharded else a, b, msg=f"output {i}, {world} ranks: {a.shape} {b.shape}"
        )


@pytest.mark.parametrize("world", (1, 2, 3, 4))
def test_vocabulary_parallel(world: int, tmp_path: Path) -> None:
    run(world, vocabulary_parallel, tmp_path)


class HeadModel(torch.nn.Module):
    """A backbone of one layer and a head; the loss is computed inside forward, where FSDP2 has gathered the head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Linear(D, D)
        self.lm_head = torch.nn.Linear(D, V)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        head = self.lm_head
        out = fastrl.linear_policy_loss(
            self.backbone(x), head.weight, ids, fastrl.PolicyObjective(), bias=head.bias,
            advantages=torch.tensor([1.0, -0.5, 2.0]), mask=torch.ones_like(ids),
        )  # fmt: skip
        return out.loss


def fsdp2(rank: int, world: int) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    plain, sharded = HeadModel(), HeadModel()
    sharded.load_state_dict(plain.state_dict())
    x, ids = torch.randn(3, 4, D), torch.randint(V, (3, 4))
    fully_shard(sharded, mesh=dist.device_mesh.init_device_mesh("cpu", (world,)))
    with pytest.raises(ValueError, match=r"weight: a DTensor is sharded.*inside the model's forward"):
        fastrl.linear_logprobs(x, sharded.lm_head.weight, ids)
    for train in (True, False):
        plain.train(train)
        sharded.train(train)
        a, b = plain(x, ids), sharded(x, ids)
        torch.testing.assert_close(a, b)
        a.backward()
        b.backward()
        for (name, p), q in zip(plain.named_parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(q.grad.full_tensor(), p.grad, msg=name)
        with torch.no_grad():
            torch.testing.assert_close(plain(x, ids), sharded(x, ids))


def test_fsdp2_in_train_and_eval(tmp_path: Path) -> None:
    run(2, fsdp2, tmp_path)
