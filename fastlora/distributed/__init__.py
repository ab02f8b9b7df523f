"""Training past one card: ranks that share a step, and a base that is sharded over them."""
