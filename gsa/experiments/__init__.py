"""The paper's tables and figures as commands: `gsa reproduce table1`, and others (commands.py)."""
