"""What only trials need: a model, texts and questions out of public packages, and how they are read."""
