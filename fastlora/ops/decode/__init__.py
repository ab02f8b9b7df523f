"""Operations on one new token per row: small products (linear.py) and attention (attention.py)."""
