"""The product: a small labeled image set, its files, card and transport."""
