import gc

import torch

from bessemer.data.reading.buffers import Buffers


def test_memory_is_used_again_only_when_nothing_refers_to_it() -> None:
    buffers = Buffers((4, 8, 8, 3))
    first = buffers.take()
    address = first.data_ptr()
    assert buffers.take().data_ptr() != address  # the first is still held
    part = first[1:2].permute(0, 3, 1, 2).numpy()[..., ::2]
    del first
    gc.collect()
    kept = [buffers.take() for _ in range(4)]
    assert address not in [tensor.data_ptr() for tensor in kept]  # a view of a view still is
    del part
    assert buffers.take().data_ptr() == address
    assert all(tensor.shape == (4, 8, 8, 3) and tensor.dtype == torch.uint8 for tensor in kept)


def test_a_loop_needs_few_buffers() -> None:
    buffers = Buffers((2, 4, 4, 3))
    addresses = set()
    for _ in range(100):
        tensor = buffers.take()
        addresses.add(tensor.data_ptr())
    assert len(addresses) <= 2
