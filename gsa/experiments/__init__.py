"""The paper's tables and figures as commands: `gsa reproduce table2 | rivals | figure3a`."""
