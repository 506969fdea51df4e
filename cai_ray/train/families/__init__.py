"""Families of models: a table of what works with which, and the small models that the table is found with."""
