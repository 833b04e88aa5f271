"""Evaluation suites, their tasks and items. Data keep the items out of training, evaluation asks them."""
