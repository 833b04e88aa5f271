"""Where stages run: one file an executor, and the table of what each stage asks for."""
