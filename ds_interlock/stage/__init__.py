"""One stage's share of the work, and the pipeline of stages in one process."""
