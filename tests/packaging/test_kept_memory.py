"""extension.empty: large buffers on the CPU are given again to the next caller once they are free, never before."""

from __future__ import annotations

import gc
import mmap

import pytest
import torch

from r1kernels import extension

pytestmark = pytest.mark.skipif(extension.missing() is not None, reason=str(extension.missing()))
SHAPE = (1000, 1100)  # 4.4 MB in float32
FREE = (7000, 9001)  # 252 MB in float32, more than another test leaves behind


def test_a_free_buffer_is_given_again():
    first = extension.empty(FREE, torch.float32)
    address = first.data_ptr()
    del first
    gc.collect()
    second = extension.empty(FREE, torch.float32)
    assert second.data_ptr() == address and second.shape == FREE and second.is_contiguous()


def test_a_buffer_in_use_is_not_given_again():
    first = extension.empty(SHAPE, torch.float32).fill_(1.0)
    view = first[500:, :10]
    del first
    gc.collect()
    second = extension.empty(SHAPE, torch.float32).fill_(2.0)
    assert (view == 1.0).all() and (second == 2.0).all()


@pytest.mark.parametrize("shape", [(), (0,), (3, 4), SHAPE], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_shape_and_dtype(shape, dtype):
    tensor = extension.empty(shape, dtype)
    assert tensor.shape == shape and tensor.dtype == dtype and tensor.device.type == "cpu"
    tensor.fill_(3.0)
    assert (tensor == 3.0).all()


def test_what_is_kept_can_be_released():
    extension.release()  # what earlier tests left
    with open("/proc/self/statm") as statm:
        pages = [int(statm.read().split()[1])]
        extension.empty(FREE, torch.uint8).fill_(1)
        for _ in range(2):
            gc.collect()
            statm.seek(0)
            pages.append(int(statm.read().split()[1]))
            extension.release()
    before, kept, released = (count * mmap.PAGESIZE for count in pages)
    size = FREE[0] * FREE[1]
    assert kept - before > size / 2 and released - before < size / 2
