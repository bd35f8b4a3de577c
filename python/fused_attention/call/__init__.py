"""What a call is, and who serves it: validation, the table of backends, the choice, `explain`."""
