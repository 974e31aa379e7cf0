"""The planner: pure decisions about requests, steps, pages and slots. No torch, no clock, no I/O; numpy only."""
