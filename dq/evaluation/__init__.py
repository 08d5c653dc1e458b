"""How good a set is: students trained on it, beside real images of equal number."""
