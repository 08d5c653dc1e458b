"""Images and labels in, tensors out."""
