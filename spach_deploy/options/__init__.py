"""The options of all commands: one table, from which click options, recipe keys and recorded commands are made.

`table` lists the options; `specs` has the frozen objects that they fill. `recipe` converts given values to these
objects and reads them from TOML, `keywords` from Python keywords, `command_line` writes options as a command
line, and `click_options` makes what click parses and `--help` shows.
"""
