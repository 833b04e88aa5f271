"""What fits where, how fast, how long and how much: arithmetic that needs neither a GPU nor torch."""
