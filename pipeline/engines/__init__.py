"""Who runs a teacher: one file per engine, each with one function `ask` (see pipeline.teacher.Ask)."""
