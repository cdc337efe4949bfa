"""What each word after `llmevo` does: one command a file, its function the command."""
