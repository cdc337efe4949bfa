"""Whether what is reported was nearly searched on."""

from llmevo.preflight.base import Finding, Findings
from llmevo.questions import near_duplicates
from llmevo.rig import Rig


def questions(rig: Rig) -> Findings:
    """Questions of later sets that are search questions with a few words changed; equal ones are refused elsewhere."""
    for name, evaluator in rig.evaluators.items():
        if name == "search":
            continue
        found = near_duplicates(evaluator.questions(), rig.evaluator.questions())
        if found:
            (task, text), (_, other) = found[0]
            yield Finding(
                f"{name} questions",
                f"{len(found)} are nearly search questions, such as {text[:60]!r} of {task} and {other[:60]!r}",
                "Leave them out, or expect a score that flatters",
            )
