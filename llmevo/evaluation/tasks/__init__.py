"""What is asked of a model, and how: the lines of `tasks:`, and the protocol.

`loading` makes lm-eval's task objects of them; it is imported where something is asked, for lm-eval takes seconds.
"""

from llmevo.evaluation.tasks.task import AskingOptions, Task

__all__ = ["AskingOptions", "Task"]
