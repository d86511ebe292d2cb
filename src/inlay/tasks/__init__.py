"""Tasks: what a model is adapted to. One file a task; `inlay.tasks.task` says what all of them share."""
