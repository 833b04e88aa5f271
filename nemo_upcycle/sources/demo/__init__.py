"""Assets for trials only: a model, texts and questions from public packages, and their readers."""
