"""The planner: which layout fits, its speed, the training time and the cost, computed without a GPU and torch."""
