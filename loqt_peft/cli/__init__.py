"""The command line: `loqt`, or `python -m loqt_peft`. What a command needs is imported when it runs."""
