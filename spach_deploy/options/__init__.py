"""What a user can ask for: one table, from which commands, recipes and command lines are made."""
