"""Quantised weights: records (weights.py), bitsandbytes, dequantisation, fake quantisation."""
