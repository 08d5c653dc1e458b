"""A CUDA device for machines without one: finds host and device mixed up, and counts launches, waits and copies.

Tensors on the device are `FakeCudaTensor`s: they say `cuda:0`, hold their values on the CPU, refuse to meet CPU
tensors where CUDA refuses, and write what CUDA would have done into a `DeviceLog`, by line of `dq`. Autograd,
`torch.autocast("cuda")`, `GradScaler` and every branch on `device.type == "cuda"` are the real ones.

    pytest --fake-cuda -m gpu            # tests of device code, on this device
    pytest --fake-cuda -m gpu -s --device-report 20   # and the lines of dq with most launches, waits and copies

It cannot be taken back, so it is for processes of its own: `tests/integration/test_fake_cuda.py` starts one.

What it does not see: kernels (shared memory, numerics of TF32 and atomics, failures of cuDNN), memory and its end,
streams and the overlap of copies with work, several devices and NCCL. Attention counts as its plain formula, not as
one fused kernel; an operation on a list of tensors (`torch._foreach_*`) counts as one launch.
"""
