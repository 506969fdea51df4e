"""The Ray cluster: joining it, checking that it has room, and counting what a stage uses of it."""
