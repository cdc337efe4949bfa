"""From weights to a score: the evaluator, the tasks, the judges, racing and standard errors."""
