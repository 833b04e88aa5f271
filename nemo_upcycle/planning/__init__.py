"""The planner: find layouts that fit, and predict speed, training time and cost, without a GPU and without torch."""
