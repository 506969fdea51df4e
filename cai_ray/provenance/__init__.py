"""Where results come from: what a stage depends on, what has changed since it was made, and copies of it."""
