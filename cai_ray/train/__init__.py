"""Training: pure mathematics, models and batches below, one readable loop per stage above them."""
