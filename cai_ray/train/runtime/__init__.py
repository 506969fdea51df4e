"""What the training loops run on: Ray Train, DeepSpeed, checkpoints, metrics."""
