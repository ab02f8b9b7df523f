"""Laws of training on several ranks, run by gloo processes on the CPU."""
