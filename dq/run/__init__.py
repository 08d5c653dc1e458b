"""Run folders, units of work, resuming and processes."""
