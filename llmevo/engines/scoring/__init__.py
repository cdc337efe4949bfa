"""Answers to lm-eval's requests: by transformers in this process, or by vLLM."""
