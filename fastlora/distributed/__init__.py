"""Training past one card: a base that is sharded over ranks, or that waits in host memory."""
