"""Images (and labels) to better images (and labels): one file per method."""
