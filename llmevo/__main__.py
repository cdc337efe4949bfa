"""`python -m llmevo` is `llmevo`: for where the command is not on the path."""

from llmevo.cli.app import main

main()
