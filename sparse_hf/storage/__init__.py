"""What is on disk or on the Hub, and can it be trusted? Files only: no model is needed to read one."""
