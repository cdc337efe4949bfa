"""llmevo: evolve the merge of your fine-tuned language models, with a language model in the loop."""

__version__ = "0.1.0"
