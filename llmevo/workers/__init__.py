"""Workers: scorers in this process, in other processes, and on other machines, behind one protocol."""
