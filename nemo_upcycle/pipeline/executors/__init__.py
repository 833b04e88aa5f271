"""The executors that run stages, one file per executor, and the executors' settings for each stage."""
