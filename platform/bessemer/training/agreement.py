"""Whether all workers hold the same weights and buffers: one 64-bit number per network, compared at checkpoints.

ZeRO 0, 1 and 2 leave a whole copy of each network on every worker. The copies are equal bit by bit, unless a device
computes wrongly or a system draws from a generator of its own; then the run is worth nothing, and nobody would notice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bessemer.errors import TrainingError
from bessemer.systems.contract import Clock
from bessemer.training.distributed import Workers
from bessemer.training.engine import NetworkEngine

__all__ = ["check_agreement", "fingerprint", "network_fingerprint"]

_CHUNK = 1 << 22  # elements hashed at a time: bounds what is allocated to 64 MiB
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor:
    """Σ (2i + 1)·bitsᵢ modulo 2⁶⁴ over the elements of a tensor: an int64 scalar on its device.

    A change of one element always changes it, because 2i + 1 has an inverse modulo 2⁶⁴; so do most others.
    """
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(_BITS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, len(bits), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        odd = torch.arange(2 * start + 1, 2 * (start + len(part)), 2, device=flat.device)
        total += (part * odd).sum()  # int64 wraps
    return total


def _odd(name: str) -> int:
    """An odd number of 62 bits from a tensor's name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 2 | 1


def network_fingerprint(network: nn.Module) -> Tensor:
    """One number for all parameters and persistent buffers: an int64 scalar."""
    prints = {name: fingerprint(t) for name, t in network.state_dict(keep_vars=True).items()}
    factors = torch.tensor([_odd(name) for name in prints])
    numbers = torch.stack(list(prints.values()))
    return (numbers * factors.to(numbers.device)).sum()


def check_agreement(engines: Mapping[str, NetworkEngine], workers: Workers, clock: Clock) -> None:
    """Compare every network over the workers. Collective.

    Raises:
        TrainingError: two workers differ; on all workers alike.
    """
    if workers.size == 1 or not engines:
        return
    numbers = torch.stack([network_fingerprint(engine.module) for engine in engines.values()])
    everybody = workers.gather(numbers.tolist())
    for i, (name, engine) in enumerate(engines.items()):
        if len({numbers[i] for numbers in everybody}) > 1:
            raise TrainingError(_difference(name, engine.module, workers, clock))


def _difference(network: str, module: nn.Module, workers: Workers, clock: Clock) -> str:
    mine = {key: int(fingerprint(t)) for key, t in module.state_dict(keep_vars=True).items()}
    everybody = workers.gather(mine)
    differing = [key for key in mine if len({prints[key] for prints in everybody}) > 1]
    groups: dict[int, list[str]] = {}
    for rank, prints in enumerate(everybody):
        groups.setdefault(prints[differing[0]], []).append(str(rank))
    sides = " and ".join(", ".join(group) for group in sorted(groups.values(), key=len, reverse=True))
    more = f" and {len(differing) - 1} more tensors of {network} differ" if len(differing) > 1 else " differs"
    return (
        f"{network}.{differing[0]}{more} between workers {sides} at {clock.kimg:g} kimg, so no checkpoint was written. "
        "A device computed wrongly, or the system draws random numbers that are not its generator's. Check the devices "
        "of the fewer, then go on from the last checkpoint; guards.compare_workers: false leaves this test out."
    )
