"""The report of a run: one JSON object, one HTML page, one table for the terminal."""
