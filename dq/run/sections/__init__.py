"""Sections of the report of a run: content of templates from files of the run folder."""
