"""Votes and labels as numbers: how they are combined, calibrated, certified; what a text looks like."""
