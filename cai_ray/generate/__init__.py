"""Generation stages: chains of engine calls, one row at a time, streamed by Ray Data."""
