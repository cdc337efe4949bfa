"""The event log: its events, the file, the state that follows from it, and its replay."""
