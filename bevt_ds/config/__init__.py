"""One family of configurations, from a recipe and `key=value` to validated frozen dataclasses.

schema.py has every field, fields.py what stands with one, recipes.py the starting points, parse.py reads overrides,
files.py those in files and the settings of earlier runs, validate.py checks the whole, deepspeed.py merges the
engine's JSON, command_line.py and help.py serve the commands.
Imports no torch.
Start with schema.py.
"""
