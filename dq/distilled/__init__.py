"""The product: a small labelled image set, its files, card and transport."""
