"""SwiGLU over adapted gate and up projections, as one Triton kernel in each direction."""
