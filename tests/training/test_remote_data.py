"""Two workers that train from a web server whose connections break end with the same bits as from the disk."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tests.servers import Fault, fault_server

from bessemer.data.packing.pack import pack

_STEPS = 8
"""Every step reads from all shards: those of a small set are all needed from the start."""

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def test_dropped_connections_change_no_weight(
    run_script: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "set"
    pack("digits", packed, size=32, shard_bytes=300 << 10)
    from_disk = run_script("world_run.py", 2, packed, "--steps", _STEPS)  # type: ignore[operator]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = random.Random(0)
    with fault_server() as server:
        server.objects.update({path.name: path.read_bytes() for path in packed.iterdir()})
        for name, data in server.objects.items():
            kinds = [rng.choice(["drop", "reset", "503"]) for _ in range(4)]
            server.faults[name] = [Fault(kind, at=rng.randrange(len(data) // 5)) for kind in kinds]
        from_server = run_script("world_run.py", 2, server.url, "--steps", _STEPS)  # type: ignore[operator]
        shards = [name for name in server.objects if name.endswith(".tar")]
        assert len(shards) > 3
        assert not any(server.faults[name] for name in shards)  # all of them happened
        complete = [name for name, status, _, sent in server.requests if name.endswith(".tar") and status in (200, 206)]
        assert set(complete) == set(shards)
    for theirs, ours in zip(from_disk, from_server, strict=True):
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    begun = {key.removeprefix("start."): value for key, value in from_disk[0].items() if key.startswith("start.")}
    assert begun
    assert not any(torch.equal(value, from_disk[0][key]) for key, value in begun.items() if key.endswith("weight"))
