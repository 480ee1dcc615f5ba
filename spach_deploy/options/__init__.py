"""What a user can ask for: one table of options, from which click options, recipe keys and command lines are made.

`table` is the data, `specs` the frozen objects that the options fill. `values` goes from what was given to these,
`recipe` reads a TOML file, `command_line` goes back to words, and `click_options` makes what click parses and shows.
"""
