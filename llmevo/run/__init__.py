"""One run: what it is made with, its loop, its log and its end."""
