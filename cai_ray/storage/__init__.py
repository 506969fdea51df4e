"""Files on any file system, records as tables, and the directory of a run."""
