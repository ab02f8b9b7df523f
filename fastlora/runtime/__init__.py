"""How functions of tensors are run: differentiated, compiled, recorded, and kept in less memory.

Nothing here knows about models. gradients.py and per_example.py differentiate, compiled.py calls
torch.compile, cuda_graph.py records and replays launches, host_offload.py keeps activations in host
memory, and tree.py walks nested containers.
"""
