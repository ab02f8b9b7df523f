"""How functions of tensors are run: differentiated, compiled, recorded, and kept in less memory.

gradients.py, per_example.py        derivatives
compiled.py, kernels_ahead.py       torch.compile, and Triton's kernels compiled meanwhile
first_step.py, ahead.py             threads that prepare the first step
cuda_graph.py, pinned_buffers.py    launches recorded and replayed, and the host memory they use
host_offload.py, layer_fetching.py  activations in host memory; layers that are not on the device
copy_stream.py                      copies beside the compute stream
devices.py, host_memory.py, cores.py  what the machine has
tree.py                             nested containers
"""
