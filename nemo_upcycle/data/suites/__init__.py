"""Evaluation suites, their tasks and items. The data stage keeps items out of training; evaluations ask the items."""
